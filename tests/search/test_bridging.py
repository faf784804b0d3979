"""Language models with another tokenizer in the search: against token-synchronous fusion, and with real tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from transformers import WhisperTokenizer as RealWhisperTokenizer

from shallowfusion import FusionDecoder, fusion
from shallowfusion.config import BeamSettings
from shallowfusion.errors import InvalidArgumentError, VocabularyError
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.byte_bridge import BridgeSettings, ByteBridge, ByteLanguage
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.loading import AcousticModel, WhisperTokens
from shallowfusion.scorers.whisper import WhisperScorer
from shallowfusion.search.loop import SearchPlan, StageClock, search
from shallowfusion.text.vocabulary import Vocabulary, vocabulary_of
from shallowfusion.values import Unmapped
from tests.tiny import END, FEATURES, NO_TIMESTAMPS, START, random_encoder_output, random_whisper, tiny_lm, tiny_whisper

TOKENIZERS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizers"
WEIGHT = 0.4
LETTERS = 3  # tokens the search may say, so that every continuation is a candidate


def letters(size: int, name: str) -> Vocabulary:
    return Vocabulary((*(bytes([65 + i]) for i in range(END)), *[None] * (size - END)), END, END, name)


def fused(seed: int, bridged: bool, utterances: int = 4, ending: str = "neutral") -> list[Any]:
    acoustic, model = tiny_whisper(seed), tiny_lm(seed + 1)
    acoustic.scorer.vocabulary, model.vocabulary = letters(44, "letters"), letters(41, "letters of the lm")
    said = tuple(i for i in range(44) if i >= LETTERS and i != END)
    silence = Unmapped("floor", 0.0)
    plan = SearchPlan(
        BeamSettings(beam_size=5, end_ids=(END,), max_new_tokens=9),
        fusion.static(() if bridged else WEIGHT),
        (None,) if bridged else (None, torch.tensor([*range(END), END if ending == "lm" else -1, -1, -1, -1]).int()),
        (silence,) * (1 if bridged else 2) if ending != "neutral" else (Unmapped("neutral"),) * (1 if bridged else 2),
        suppressed=said,
    )
    prompts = [[START, NO_TIMESTAMPS]] * utterances
    contexts = [Context(prompts, 5, 9, random_encoder_output(acoustic, utterances, seed))]
    late = []
    if bridged:
        language = ByteLanguage(model, acoustic.scorer.vocabulary)
        late.append(ByteBridge(language, [model.prompt()] * utterances, END, WEIGHT, BridgeSettings(ending=ending)))
        return search([acoustic.scorer], contexts, ["asr"], plan, StageClock(), late)
    contexts.append(Context([model.prompt()] * utterances, 5, 9))
    return search([acoustic.scorer, model], contexts, ["asr", "lm"], plan, StageClock())


@pytest.mark.parametrize("ending", ["neutral", "asr_only", "lm"])
@pytest.mark.parametrize("seed", range(4))
def test_equal_tokenizers_give_token_synchronous_fusion(seed: int, ending: str) -> None:
    """One byte per token: each text has one cut, and both ways see every continuation."""
    lengths = set()
    for ours, theirs in zip(fused(seed, True, ending=ending), fused(seed, False, ending=ending), strict=True):
        assert [h.token_ids for h in ours.hypotheses] == [h.token_ids for h in theirs.hypotheses]
        for one, other in zip(ours.hypotheses, theirs.hypotheses, strict=True):
            assert one.total == pytest.approx(other.total, abs=1e-4)
            np.testing.assert_allclose(one.parts, other.parts, atol=1e-4)
            lengths.add(len(one.token_ids))
    assert len(lengths) > 1


@pytest.fixture(scope="module")
def whisper() -> AcousticModel:
    """Multilingual Whisper's tokenizer and its size of vocabulary over a model of width 32."""
    if not TOKENIZERS.exists():
        pytest.skip("the shared tokenizers are not here")
    tokenizer = RealWhisperTokenizer.from_pretrained(str(TOKENIZERS / "whisper-large-v3"))
    special = tokenizer.get_vocab()
    end, start = special["<|endoftext|>"], special["<|startoftranscript|>"]
    torch.manual_seed(0)
    model = random_whisper(51866, 5.0, end, start)
    vocabulary = vocabulary_of(tokenizer, 51866, end, name="whisper-large-v3")
    languages = {"en": special["<|en|>"], "zh": special["<|zh|>"]}
    tasks = {"transcribe": special["<|transcribe|>"], "translate": special["<|translate|>"]}
    suppressed = tuple(i for i, token in enumerate(vocabulary.tokens) if token is None and i != end)
    tokens = WhisperTokens(start, end, special["<|notimestamps|>"], None, languages, tasks, suppressed, ())
    return AcousticModel("tiny large-v3", WhisperScorer(model, vocabulary), tokenizer, FEATURES, tokens)


@pytest.fixture(scope="module")
def gpt2() -> CausalLMScorer:
    if not TOKENIZERS.exists():
        pytest.skip("the shared tokenizers are not here")
    folder = TOKENIZERS / "gpt2"
    tokenizer = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=50257, n_embd=32, n_layer=1, n_head=4, n_positions=128)
    vocabulary = vocabulary_of(tokenizer, 50257, 50256, 50256, name="gpt2")
    return CausalLMScorer(GPT2LMHeadModel(config).eval(), vocabulary, tokenizer)


def test_refusal_names_the_bridge(whisper, gpt2) -> None:
    with pytest.raises(VocabularyError, match='lm_bridge="bytes"'):
        FusionDecoder(whisper, [gpt2]).decode(random_encoder_output(whisper, 1), lm_weight=0.3)
    with pytest.raises(InvalidArgumentError, match="lm_bridge must be 'bytes' or None"):
        FusionDecoder(whisper, [gpt2], lm_bridge="words")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["neutral", "asr_only", "lm"])
def test_multilingual_whisper_goes_with_gpt2(whisper, gpt2, policy) -> None:
    decoder = FusionDecoder(whisper, [gpt2], lm_bridge="bytes")
    assert decoder.source_names == ("asr", "lm")
    states = random_encoder_output(whisper, 3, seed=4)
    options = {"beam_size": 3, "n_best": 3, "max_new_tokens": 8, "language": "en", "end_policy": policy}
    results = decoder.decode(states, rule=fusion.static(WEIGHT), **options)
    language = ByteLanguage(gpt2, whisper.scorer.vocabulary)
    for result in results:
        assert result.rule == fusion.static(WEIGHT)
        for hypothesis in result.n_best:
            parts = hypothesis.parts
            assert set(parts) == {"asr", "lm"}
            assert hypothesis.total == pytest.approx(parts["asr"] + WEIGHT * parts["lm"], abs=1e-3)
            # the language model's part is that of the whole text, scored from scratch
            alone = ByteBridge(language, [gpt2.prompt()], whisper.tokens.end, 1.0, BridgeSettings(ending=policy))
            total = 0.0
            for token in hypothesis.tokens:
                one = np.array([[token.id]])
                total += float(alone.increments(np.zeros_like(one), one)[0, 0])
                alone.follow(np.zeros_like(one), one)
            assert parts["lm"] == pytest.approx(total, abs=1e-3)
    reranked = results[0].rerank(fusion.static(WEIGHT))
    assert [h.token_ids for h in reranked.n_best] == [h.token_ids for h in results[0].n_best]


def test_batch_and_weight_zero_change_nothing(whisper, gpt2) -> None:
    decoder = FusionDecoder(whisper, [gpt2], lm_bridge="bytes")
    states = random_encoder_output(whisper, 4, seed=9)
    options = {"beam_size": 3, "max_new_tokens": 7, "language": "en"}
    together = decoder.decode(states, rule=fusion.static(WEIGHT), **options)
    for i, result in enumerate(together):
        (alone,) = decoder.decode(states[i : i + 1], rule=fusion.static(WEIGHT), **options)
        assert alone.n_best[0].token_ids == result.n_best[0].token_ids
        assert alone.n_best[0].total == pytest.approx(result.n_best[0].total, abs=1e-3)
    plain = FusionDecoder(whisper).decode(states, **options)
    silent = decoder.decode(states, rule=fusion.static(0.0), **options)
    assert [r.n_best[0].token_ids for r in silent] == [r.n_best[0].token_ids for r in plain]
    late = decoder.decode(states, rule=fusion.piecewise(WEIGHT, 100), **options)
    assert [r.n_best[0].token_ids for r in late] == [r.n_best[0].token_ids for r in plain]


def test_rules_that_need_every_token_are_refused(whisper, gpt2) -> None:
    decoder = FusionDecoder(whisper, [gpt2], lm_bridge="bytes")
    states = random_encoder_output(whisper, 1)
    for options, message in (
        ({"rule": fusion.uadf()}, "looks at every token of its language models"),
        ({"rule": fusion.static(0.1), "end_policy": "end_factored"}, "needs every token of the language models"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            decoder.decode(states, max_new_tokens=2, language="en", **options)


def test_a_text_scores_at_least_its_usual_cut(whisper, gpt2) -> None:
    """English, Chinese, an emoji whose bytes the acoustic tokens part: never below the tokenizer's own cut."""
    language = ByteLanguage(gpt2, whisper.scorer.vocabulary)
    for text in (" Hello world, this is a transcription.", " 你好，世界", " well 🦆 then", " antidisestablishment"):
        bridge = ByteBridge(language, [gpt2.prompt()], whisper.tokens.end, 1.0)
        total = 0.0
        for token in whisper.tokenizer.encode(text, add_special_tokens=False):
            one = np.array([[token]])
            total += float(bridge.increments(np.zeros_like(one), one)[0, 0])
            bridge.follow(np.zeros_like(one), one)
        ids = gpt2.tokenizer.encode(text)
        with torch.inference_mode():
            logits = gpt2.model(torch.tensor([[*gpt2.prompt(), *ids]])).logits[0, :-1]
        usual = torch.log_softmax(logits, dim=1)[range(len(ids)), ids].sum()
        assert float(usual) - 1e-3 <= total <= float(usual) + 0.2 * len(text)
