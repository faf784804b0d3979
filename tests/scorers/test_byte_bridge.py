"""The byte bridge against the sum over every token sequence, written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from shallowfusion.errors import InvalidArgumentError, VocabularyError
from shallowfusion.scorers.byte_bridge import BridgeSettings, ByteBridge, ByteLanguage
from shallowfusion.scorers.byte_covers import Segmenter, last_word, words
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.text.byte_order import ByteOrder
from shallowfusion.text.vocabulary import Vocabulary

LANGUAGE = (b"a", b"b", b" ", b"ab", b"ba", b" a", b"abb", b"bab", b" ab", None)
LM_END = 9
ACOUSTIC = (b"a", b"ab", b" b", b"bba", b" a", b"b", b"\xff", None, None)
END, SPECIAL = 8, 7


def random_lm(tokens: tuple[bytes | None, ...], seed: int = 0, positions: int = 64) -> CausalLMScorer:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokens), n_embd=32, n_layer=2, n_head=4, n_positions=positions)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(4.0)
    end = len(tokens) - 1
    return CausalLMScorer(model, Vocabulary(tokens, end, end, "toy lm"))


def acoustic(tokens: tuple[bytes | None, ...] = ACOUSTIC) -> Vocabulary:
    return Vocabulary(tuple(b"b" if token == b"\xff" else token for token in tokens), END, name="toy acoustic")


def next_log_probs(model: CausalLMScorer, sequence: tuple[int, ...]) -> list[float]:
    with torch.inference_mode():
        logits = model.model(torch.tensor([[*model.prompt(), *sequence]])).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=0).tolist()


def exhaustive(model: CausalLMScorer, text: bytes, sequence: tuple[int, ...] = ()) -> float:
    """P of all tokens that follow `sequence` until `text` is covered."""
    if not text:
        return 1.0
    total = 0.0
    for token, log_prob in enumerate(next_log_probs(model, sequence)):
        spelled = model.vocabulary.tokens[token]
        if spelled is not None and (text.startswith(spelled) or spelled.startswith(text)):
            total += math.exp(log_prob) * exhaustive(model, text[len(spelled) :], (*sequence, token))
    return total


def ended(model: CausalLMScorer, text: bytes, sequence: tuple[int, ...] = ()) -> float:
    """P of all sequences that spell `text` and then end."""
    log_probs = next_log_probs(model, sequence)
    total = 0.0 if text else math.exp(log_probs[LM_END])
    for token, log_prob in enumerate(log_probs):
        spelled = model.vocabulary.tokens[token]
        if text and spelled is not None and text.startswith(spelled):
            total += math.exp(log_prob) * ended(model, text[len(spelled) :], (*sequence, token))
    return total


def bridge(model: CausalLMScorer, settings: BridgeSettings, utterances: int = 1, **more: object) -> ByteBridge:
    return ByteBridge(ByteLanguage(model, acoustic()), [model.prompt()] * utterances, END, 0.5, settings, **more)


def say(scorer: ByteBridge, tokens: list[int]) -> list[float]:
    """Increments of one hypothesis that says `tokens`."""
    found = []
    for token in tokens:
        candidates = np.array([[token]])
        found.append(float(scorer.increments(np.zeros_like(candidates), candidates)[0, 0]))
        scorer.follow(np.array([[0]]), candidates)
    return found


def spelled(tokens: list[int]) -> bytes:
    return b"".join(acoustic().tokens[token] or b"" for token in tokens)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("path", [[1, 3, 4], [0, 2, 5, 0], [4, 1, 2, 3], [5, 5, 0, 0, 4]])
def test_every_cover_is_counted(seed: int, path: list[int]) -> None:
    model = random_lm(LANGUAGE, seed)
    scorer = bridge(model, BridgeSettings(covers="all"))
    increments = say(scorer, path)
    for count in range(1, len(path) + 1):
        exact = math.log(exhaustive(model, spelled(path[:count])))
        assert sum(increments[:count]) == pytest.approx(exact, abs=1e-5)
    assert scorer.log_probs()[0, 0] == pytest.approx(sum(increments), abs=1e-5)


def test_next_bytes_and_the_end_share_the_probability_of_the_text() -> None:
    """Sum over every next byte of P(text byte), and P(text, end), is P(text)."""
    model = random_lm(LANGUAGE, seed=5)
    language = ByteLanguage(model, Vocabulary((b"a", b"b", b" ", None), 3, name="letters"))
    scorer = ByteBridge(language, [model.prompt()], 3, 1.0, BridgeSettings(covers="all", ending="lm"))
    for token in (0, 1, 2, 0):
        candidates = np.array([[0, 1, 2, 3]])
        increments = scorer.increments(np.zeros_like(candidates), candidates)
        assert np.exp(increments.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)
        scorer.follow(np.array([[0]]), np.array([[token]]))


def test_end_is_the_probability_of_ending_exactly_here() -> None:
    model = random_lm(LANGUAGE, seed=1)
    for path in ([], [1, 5], [0, 3]):
        scorer = bridge(model, BridgeSettings(covers="all", ending="lm"))
        total = sum(say(scorer, [*path, END]))
        assert total == pytest.approx(math.log(ended(model, spelled(path))), abs=1e-5)


def test_neutral_and_silent_endings() -> None:
    model = random_lm(LANGUAGE, seed=1)
    favourite = max(next_log_probs(model, (3,)))  # after "ab", whose usual cut is one token
    assert say(bridge(model, BridgeSettings(ending="neutral")), [1, END])[1] == pytest.approx(favourite, abs=1e-5)
    assert say(bridge(model, BridgeSettings(ending="asr_only")), [1, SPECIAL, END])[1:] == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_usual_cut_is_a_lower_bound_that_counts_each_cover_exactly(seed: int) -> None:
    model = random_lm(LANGUAGE, seed)
    for path in itertools.product((0, 1, 2, 4), repeat=3):
        total = sum(say(bridge(model, BridgeSettings()), list(path)))
        exact = math.log(exhaustive(model, spelled(list(path))))
        cut = Segmenter(ByteOrder(LANGUAGE), LANGUAGE)(spelled(list(path)))
        assert cut is not None
        alone = sum(next_log_probs(model, cut[:i])[token] for i, token in enumerate(cut))
        assert alone - 1e-5 <= total <= exact + 1e-5


def test_usual_cut_is_exact_where_there_is_no_other() -> None:
    letters = (b"a", b"b", b" ", b"c", None)
    model = random_lm(letters)
    language = ByteLanguage(model, acoustic())
    for settings in (BridgeSettings(), BridgeSettings(covers="all")):
        scorer = ByteBridge(language, [model.prompt()], END, 1.0, settings)
        path = [1, 3, 4, 2]
        cut = tuple(letters.index(bytes([byte])) for byte in spelled(path))
        wanted = sum(next_log_probs(model, cut[:i])[token] for i, token in enumerate(cut))
        assert sum(say(scorer, path)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("covers", ["canonical", "all"])
def test_hypotheses_fork_and_utterances_leave(covers: str) -> None:
    """A random search over two lanes scores each path as if it were alone, and gives back what it held."""
    model = random_lm(LANGUAGE, seed=2)
    settings = BridgeSettings(covers=covers)
    scorer = bridge(model, settings, utterances=3)
    rng = np.random.default_rng(0)
    paths: list[list[list[int]]] = [[[]], [[]], [[]]]
    totals = np.zeros((3, 1))
    for step in range(4):
        lanes = np.array([[0, 0, len(own) - 1, len(own) - 1] for own in paths])
        tokens = rng.integers(0, 6, lanes.shape)
        tokens[:, 1] = (tokens[:, 0] + 1) % 6
        increments = scorer.increments(lanes, tokens)
        chosen = np.array([rng.permutation(4)[:2] for _ in paths])
        parents, said = np.take_along_axis(lanes, chosen, 1), np.take_along_axis(tokens, chosen, 1)
        totals = np.take_along_axis(totals, parents, 1) + np.take_along_axis(increments, chosen, 1)
        paths = [
            [[*paths[u][p], int(t)] for p, t in zip(*row, strict=True)]
            for u, row in enumerate(zip(parents, said, strict=True))
        ]
        scorer.follow(parents, said)
        if step == 2:
            scorer.keep([2, 1])
            paths, totals = [paths[2], paths[1]], totals[[2, 1]]
    for own, row in zip(paths, totals, strict=True):
        for path, total in zip(own, row, strict=True):
            assert total == pytest.approx(sum(say(bridge(model, settings), path)), abs=2e-5)
    scorer.tree.retain([[], []])
    assert scorer.tree.num_nodes == 0
    assert scorer.tree.num_slots == 0


def test_a_pass_is_made_only_for_boundaries() -> None:
    model = random_lm(LANGUAGE)
    scorer = bridge(model, BridgeSettings())
    several = np.array([[0, 1, 4, 5]])  # each is one token of the language model
    scorer.increments(np.zeros_like(several), several)
    assert scorer.num_passes == 1  # the prompt
    scorer.follow(np.array([[0, 0]]), np.array([[1, 4]]))
    assert scorer.num_passes == 2
    inside = np.array([[3, 3]])  # "bba": the usual cut has a boundary inside
    scorer.increments(np.array([[0, 1]]), inside)
    assert scorer.num_passes == 3


def test_equal_texts_share_what_is_read() -> None:
    scorer = bridge(random_lm(LANGUAGE), BridgeSettings())
    candidates = np.array([[0, 0]])
    scorer.increments(candidates * 0, candidates)
    scorer.follow(np.array([[0, 0, 0]]), np.array([[0, 0, 0]]))
    assert scorer.tree.num_slots == 2  # the prompt and one token


def test_outgrowing_the_window_keeps_the_last_half() -> None:
    model = random_lm((b"a", b"b", None), positions=8)
    language = ByteLanguage(model, Vocabulary((b"a", b"b", None), 2, name="letters"))
    scorer = ByteBridge(language, [model.prompt()], 2, 1.0)
    path = [0, 1, 1, 0, 1, 0, 0, 1, 1]
    increments = say(scorer, path)
    with torch.inference_mode():
        kept = torch.log_softmax(model.model(torch.tensor([path[4:8]])).logits[0, -1], dim=0)
    assert increments[8] == pytest.approx(float(kept[path[8]]), abs=1e-5)


def test_weight_follows_a_schedule() -> None:
    scorer = bridge(random_lm(LANGUAGE), BridgeSettings(), schedule=lambda step: float(step >= 2))
    assert scorer.weight == 0.0
    say(scorer, [0, 1])
    assert scorer.weight == 0.5


def test_a_language_model_that_lacks_bytes_is_refused() -> None:
    with pytest.raises(VocabularyError, match="1 bytes of the acoustic model's tokens"):
        ByteLanguage(random_lm((b"a", b" ", b"ab", None)), acoustic())


def test_bad_settings_are_refused() -> None:
    for wrong in ({"covers": "some"}, {"max_open": -1}, {"min_share": 1.0}, {"ending": "end_factored"}):
        with pytest.raises(InvalidArgumentError):
            BridgeSettings(**wrong)


def test_words_are_cut_before_spaces() -> None:
    assert words(b" one two  three ") == [b" one", b" two", b"  three", b" "]
    assert last_word(b" one two") == 4
    assert last_word(b"") == 0


class Pairs:
    """A tokenizer of pairs of letters that spells capitals otherwise."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [3 if text[i : i + 2] == "ab" else 0 for i in range(0, len(text), 2)]


def test_the_tokenizer_cuts_unless_it_changes_bytes() -> None:
    segmenter = Segmenter(ByteOrder(LANGUAGE), LANGUAGE, Pairs())
    assert segmenter(b"abab") == (3, 3)
    assert segmenter(b"bb") == (1, 1)  # it would say "a"
    assert segmenter(b"abc") is None
