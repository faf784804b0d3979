"""Hotwords inside the search."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from shallowfusion import DecodingOptions, fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.demo.shipped import HERE, decoders, read_manifest
from shallowfusion.errors import InvalidArgumentError
from tests.tiny import random_encoder_output, tiny_decoder

OPTIONS = {
    "suppress_blank": False, "suppress_tokens": [41, 42, 43], "max_new_tokens": 14, "beam_size": 4, "n_best": 4,
    "hotwords_inside_words": True,
}  # fmt: skip


class NumberTokenizer:
    """Texts are token numbers of two digits; a leading space changes nothing."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        text = text.strip()
        return [int(text[place : place + 2]) for place in range(0, len(text), 2)]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return spelled(i for i in ids if i < 40)


def spelled(tokens: Iterable[int]) -> str:
    return "".join(f"{token:02d}" for token in tokens)


@pytest.fixture(scope="module")
def model() -> FusionDecoder:
    decoder = tiny_decoder(1)
    object.__setattr__(decoder.acoustic, "tokenizer", NumberTokenizer())
    return decoder


def occurrences(tokens: tuple[int, ...], phrase: tuple[int, ...]) -> int:
    return sum(tokens[i : i + len(phrase)] == phrase for i in range(len(tokens)))


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_totals_hold_the_weight_once_per_phrase_said_and_nothing_for_beginnings(model, weight: float) -> None:
    states = random_encoder_output(model.acoustic, 6)
    plain = model.decode(states, lm_weight=weight, **OPTIONS)
    said = max((h.token_ids for result in plain for h in result.n_best), key=len)
    phrases = {said[:2]: 3.0, said[1:4]: 2.0, (7, 9, 11): 5.0}
    hotwords = {spelled(phrase): value for phrase, value in phrases.items()}
    results = model.decode(states, lm_weight=weight, hotwords=hotwords, **OPTIONS)
    found = 0
    for hypothesis in (h for result in results for h in result.n_best):
        counts = {phrase: occurrences(hypothesis.token_ids, phrase) for phrase in phrases}
        found += sum(counts.values())
        bonus = sum(value * counts[phrase] for phrase, value in phrases.items())
        wanted = hypothesis.parts["asr"] + weight * hypothesis.parts["lm"] + bonus
        if hypothesis.ended:  # one cut off may still hold a loan for a phrase it has begun
            assert hypothesis.total == pytest.approx(wanted, abs=1e-3)
    assert found > 0


def test_hotwords_of_weight_zero_change_no_token_and_heavy_ones_are_said(model) -> None:
    states = random_encoder_output(model.acoustic, 6)
    plain = model.decode(states, lm_weight=0.0, **OPTIONS)
    none = model.decode(states, lm_weight=0.0, hotwords={"0709": 0.0}, **OPTIONS)
    assert [[h.token_ids for h in r.n_best] for r in none] == [[h.token_ids for h in r.n_best] for r in plain]
    heavy = model.decode(states, lm_weight=0.0, hotwords={"0709": 60.0}, **OPTIONS)
    assert all(occurrences(r.best.token_ids, (7, 9)) for r in heavy)
    shunned = tuple(plain[0].best.token_ids[:1])
    if shunned:
        away = model.decode(states, lm_weight=0.0, hotwords={spelled(shunned): -60.0}, **OPTIONS)
        assert shunned[0] not in away[0].best.token_ids


def test_results_do_not_depend_on_the_batch(model) -> None:
    states = random_encoder_output(model.acoustic, 6)
    hotwords = {"0709": 6.0, "030405": 8.0}
    together = model.decode(states, lm_weight=0.3, hotwords=hotwords, **OPTIONS)
    for i in range(6):
        alone = model.decode(states[i : i + 1], lm_weight=0.3, hotwords=hotwords, **OPTIONS)[0]
        assert [h.token_ids for h in alone.n_best] == [h.token_ids for h in together[i].n_best]


def test_texts_alone_get_the_common_weight() -> None:
    assert DecodingOptions(hotwords=["Fallot", "melanoma"]).weighted_hotwords() == {"Fallot": 4.0, "melanoma": 4.0}
    assert DecodingOptions(hotwords="Fallot", hotword_weight=2.0).weighted_hotwords() == {"Fallot": 2.0}
    for bad in ({"x": float("nan")}, {"": 1.0}, 5, [3], {" ": 2.0}):
        with pytest.raises(InvalidArgumentError, match="hotword"):
            DecodingOptions(hotwords=bad)


def test_rare_words_are_found_and_none_is_said_into_silence() -> None:
    decoder = decoders("cpu")["asr"]
    clips = read_manifest(HERE / "dev")[:8]
    paths = [clip.path for clip in clips]
    words = {word for clip in clips for word in clip.text.split() if len(word) > 7}
    plain = decoder.transcribe(paths)
    boosted = decoder.transcribe(paths, hotwords=dict.fromkeys(words, 5.0))

    def recalled(results: list) -> int:
        pairs = zip(results, clips, strict=True)
        return sum(word in result.text.split() for result, clip in pairs for word in words & set(clip.text.split()))

    assert recalled(boosted) >= recalled(plain) + 2
    rng = np.random.default_rng(0)
    quiet = [np.zeros(32_000, np.float32), (1e-3 * rng.standard_normal(32_000)).astype(np.float32)]
    for before, after in zip(
        decoder.transcribe(quiet), decoder.transcribe(quiet, hotwords=dict.fromkeys(words, 8.0)), strict=True
    ):
        assert not words & (set(after.text.split()) - set(before.text.split()))


def test_twenty_thousand_phrases_are_one_automaton_per_decoder(model) -> None:
    rng = np.random.default_rng(1)
    hotwords = {spelled(rng.integers(0, 40, 6)): 1.0 for _ in range(20_000)}
    states = random_encoder_output(model.acoustic, 2)
    first = model.decode(states, rule=fusion.static(0.2), hotwords=hotwords, **OPTIONS)
    automaton = model._planner._phrases._last
    again = model.decode(states, rule=fusion.static(0.2), hotwords=dict(hotwords), **OPTIONS)
    assert model._planner._phrases._last is automaton
    assert [h.total for r in first for h in r.n_best] == [h.total for r in again for h in r.n_best]
    assert torch.isfinite(torch.tensor([h.total for r in first for h in r.n_best])).all()


def test_hotwords_are_whole_words_unless_told_otherwise() -> None:
    planner = decoders("cpu")["asr"]._planner
    encode = planner.acoustic.tokenizer.encode

    def bonus(text: str, inside_words: bool) -> float:
        automaton = planner._phrases.automaton({"art": 3.0}, inside_words)
        assert automaton is not None
        state, total = [automaton.start_state], 0.0
        for token in encode(text, add_special_tokens=False):
            _, ids, values = automaton.step(state)
            listed = dict(zip(ids.tolist(), values.tolist(), strict=True))
            total += float(automaton.refunds(state)[0]) + listed.get(token, 0.0)
            state = automaton.advance(state, [token]).tolist()
        return total + float(automaton.refunds(state)[0])

    wanted = {" the heart": 0, " the art of": 3, " art": 3, " artery": 0, "art": 3, " no art's art": 6}
    assert {text: round(bonus(text, False), 4) for text in wanted} == wanted
    assert [round(bonus(text, True), 4) for text in wanted] == [3, 3, 3, 3, 3, 6]


@pytest.mark.parametrize("text", ["Fallot", "2 mg", "\u00e9"])
def test_phrases_that_no_tokens_spell_are_refused(text: str) -> None:
    """The demo's tokenizer knows a to z and drops the rest, so it would favour another text."""
    with pytest.raises(InvalidArgumentError, match="no tokens spell the phrase"):
        decoders("cpu")["asr"].transcribe(np.zeros(16_000, np.float32), hotwords={text: 4.0})
