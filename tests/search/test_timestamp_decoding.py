"""Whole decodes with timestamps on tiny random models: oracles, drivers, language models, results."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from shallowfusion import DecodingOptions, fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.search.device_loop import DevicePrograms, device_search
from shallowfusion.search.loop import SearchOutcome, StageClock, search
from shallowfusion.values import Hypothesis
from tests.ctc.joint import ctc_log_prob, tiny_head
from tests.oracles import by_openai_whisper, generated
from tests.tiny import (
    END,
    NO_TIMESTAMPS,
    START,
    TEXT_TOKENS,
    random_encoder_output,
    tiny_decoder,
    tiny_lm,
    tiny_whisper,
)

BEGIN, COUNT = NO_TIMESTAMPS + 1, 21
NEW_TOKENS = 14
OPTIONS: dict[str, Any] = {
    "without_timestamps": False, "suppress_blank": False, "suppress_tokens": (START,), "max_new_tokens": NEW_TOKENS,
    "max_initial_timestamp": 0.2,
}  # fmt: skip
MOST = 10  # the same in steps


def acoustic(seed: int) -> AcousticModel:
    """A model that says text and timestamps in turns, its head untied from what it reads."""
    model = tiny_whisper(seed, timestamps=COUNT)
    torch.manual_seed(seed)
    head = torch.nn.Linear(model.scorer.model.config.d_model, BEGIN + COUNT)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.1)
        head.bias.zero_()
        head.bias[END] = 2.0
    model.scorer.model.proj_out = head
    return model


def decoder(seed: int, lm: bool = False) -> FusionDecoder:
    return FusionDecoder(acoustic(seed), [tiny_lm(seed + 1)] if lm else [])


class Suppressed(LogitsProcessor):
    """Stands for the lists of suppressed tokens."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor(self.tokens), float("-inf"))


def by_generate(
    model: FusionDecoder, states: torch.Tensor, num_beams: int, suppressed: tuple[int, ...] = (START,), **options: Any
) -> list[list[tuple[list[int], float | None]]]:
    """transformers' search with its own rules for timestamps."""
    names = GenerationConfig(eos_token_id=END)
    names.no_timestamps_token_id, names.max_initial_timestamp_index = NO_TIMESTAMPS, MOST
    rules = [Suppressed(suppressed), WhisperTimeStampLogitsProcessor(names, begin_index=1)]
    return generated(model, states, num_beams, NEW_TOKENS, (START,), logits_processor=rules, **options)


@pytest.mark.parametrize("suppressed", [(START,), (1, 8, 22, START, 45)])
@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_and_beam_decodes_equal_generate(seed: int, num_beams: int, suppressed: tuple[int, ...]) -> None:
    model = decoder(seed)
    states = random_encoder_output(model.acoustic, 4, seed)
    options = {**OPTIONS, "suppress_tokens": suppressed}
    ours = model.decode(states, beam_size=num_beams, n_best=num_beams, **options)
    said: set[int] = set()
    for result, expected in zip(ours, by_generate(model, states, num_beams, suppressed), strict=True):
        assert [list(h.token_ids) for h in result.n_best] == [tokens for tokens, _ in expected]
        for hypothesis, (_, score) in zip(result.n_best, expected, strict=True):
            assert score is None or hypothesis.score == pytest.approx(score, abs=1e-4)
            said |= set(hypothesis.token_ids)
    assert any(token >= BEGIN for token in said)
    assert any(token < TEXT_TOKENS for token in said)


@pytest.mark.parametrize("size", [1, 2])
def test_forbidden_repetitions_are_not_weighed_as_in_generate(size: int) -> None:
    model = decoder(1)
    states = random_encoder_output(model.acoustic, 4, 5)
    ours = model.decode(states, beam_size=3, n_best=3, no_repeat_ngram_size=size, **OPTIONS)
    expected = by_generate(model, states, 3, no_repeat_ngram_size=size)
    assert [[list(h.token_ids) for h in result.n_best] for result in ours] == [
        [tokens for tokens, _ in own] for own in expected
    ]


def timed_by_openai_whisper(model: FusionDecoder, states: torch.Tensor, beam_size: int) -> dict[tuple[int, ...], float]:
    """openai-whisper's search for one recording: what it finds and the sum of its log-probs."""
    decoding = pytest.importorskip("whisper.decoding")
    names = SimpleNamespace(no_timestamps=NO_TIMESTAMPS, timestamp_begin=BEGIN, eot=END)
    rules = decoding.ApplyTimestampRules(names, 1, MOST)

    def filtered(logits: torch.Tensor, tokens: torch.Tensor) -> None:
        logits[:, START] = float("-inf")
        rules.apply(logits, tokens)

    texts, sums = by_openai_whisper(model, states, beam_size, NEW_TOKENS, (START,), filtered=filtered)
    return dict(zip(map(tuple, texts), sums, strict=True))


@pytest.mark.parametrize("beam_size", [1, 2, 5])
@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_and_beam_decodes_equal_openai_whisper(seed: int, beam_size: int) -> None:
    """It normalises over what its rules allow, which `normalize="local"` does; totals are equal then too."""
    model = decoder(seed)
    states = random_encoder_output(model.acoustic, 5, seed)
    options = DecodingOptions(stop_rule="whisper", length_penalty=None, beam_size=beam_size, **OPTIONS)
    own = model.sources(states, options)
    plan = dataclasses.replace(own.plan, normalize="local")
    outcomes = search(own.scorers, own.contexts, own.names, plan, StageClock())
    for outcome, each in zip(outcomes, states, strict=True):
        theirs = timed_by_openai_whisper(model, each[None], beam_size)
        ours = {hypothesis.token_ids: hypothesis.total for hypothesis in outcome.hypotheses}
        assert ours == pytest.approx(theirs, abs=1e-4)


def assert_well_timed(hypothesis: Hypothesis) -> None:
    """What every hypothesis decoded with timestamps keeps to."""
    ids = hypothesis.token_ids
    if not ids:
        return
    assert BEGIN <= ids[0] <= BEGIN + MOST
    assert NO_TIMESTAMPS not in ids
    times = [token for token in ids if token >= BEGIN]
    assert times == sorted(times)
    spans = hypothesis.spans
    assert spans is not None
    runs = "".join("t" if token >= BEGIN else "x" for token in ids)
    assert "ttt" not in runs
    for single in (place for place in range(1, len(runs) - 1) if runs[place - 1 : place + 2] == "xtx"):
        raise AssertionError(f"timestamp {single} stands alone within {runs}")
    for span in spans:
        assert span.first < span.last
        assert all(token < BEGIN for token in ids[span.first : span.last])
        assert ids[span.first - 1] >= BEGIN
        assert span.start == pytest.approx((ids[span.first - 1] - BEGIN) * 0.02)
        if span.end is None:
            assert span is spans[-1]
            assert span.last == len(ids)
        else:
            assert span.end > span.start
            assert span.end == pytest.approx((ids[span.last] - BEGIN) * 0.02)
    assert "".join(span.text for span in spans) == hypothesis.text
    assert sum(span.last - span.first for span in spans) == runs.count("x")


MODELS = [decoder(seed, lm=True) for seed in (1, 2)]


@settings(max_examples=25)
@given(
    st.integers(0, 1),
    st.integers(0, 1000),
    st.fixed_dictionaries(
        {
            "beam_size": st.integers(1, 5),
            "lm_weight": st.sampled_from([0.0, 0.4]),
            "stop_rule": st.sampled_from(["hf", "whisper", "espnet"]),
            "end_policy": st.sampled_from(["neutral", "end_factored", "lm", "asr_only"]),
            "asr_temperature": st.sampled_from([0.5, 1.0, 2.0]),
            "min_new_tokens": st.sampled_from([0, 6]),
            "suppress_tokens": st.sampled_from([(START,), (0, 1, 2, START, 50)]),
            "length_bonus": st.sampled_from([0.0, 1.0]),
        }
    ),
)
def test_results_keep_to_the_rules_and_both_drivers_agree(which: int, seed: int, options: dict[str, Any]) -> None:
    model = MODELS[which]
    states = random_encoder_output(model.acoustic, 3, seed)
    asked = {**OPTIONS, **options, "n_best": options["beam_size"]}
    ours = model.decode(states, driver="device", **asked)
    assert ours[0].timing is not None
    assert ours[0].timing.counts["device steps"] >= 1
    theirs = model.decode(states, driver="host", **asked)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert [h.token_ids for h in mine.n_best] == [h.token_ids for h in wanted.n_best]
        for one, other in zip(mine.n_best, wanted.n_best, strict=True):
            assert one.total == pytest.approx(other.total, abs=1e-4)
            assert one.spans == other.spans
            assert_well_timed(one)


def outcomes(model: FusionDecoder, states: torch.Tensor, device_driven: bool, **options: Any) -> list[SearchOutcome]:
    own = model.sources(states, DecodingOptions(**{**OPTIONS, **options}))
    plan = dataclasses.replace(own.plan, backend="triton" if device_driven else own.plan.backend)
    if device_driven:
        return device_search(own.scorers, own.contexts, plan, StageClock(), DevicePrograms())
    return search(own.scorers, own.contexts, own.names, plan, StageClock())


def assert_same_outcomes(ours: list[SearchOutcome], theirs: list[SearchOutcome]) -> None:
    for mine, wanted in zip(ours, theirs, strict=True):
        assert [h.token_ids for h in mine.hypotheses] == [h.token_ids for h in wanted.hypotheses]
        for one, other in zip(mine.hypotheses, wanted.hypotheses, strict=True):
            assert one.total == pytest.approx(other.total, abs=1e-4)


@pytest.mark.slow
def test_kernels_alone_equal_the_host_driven_search() -> None:
    model = decoder(1, lm=True)
    options = {"lm_weight": 0.4, "beam_size": 2, "n_best": 2, "max_new_tokens": 6}
    states = random_encoder_output(model.acoustic, 2, 6)
    assert_same_outcomes(*(outcomes(model, states, driven, **options) for driven in (True, False)))


@pytest.mark.gpu
@pytest.mark.parametrize("lm_weight", [0.0, 0.4])
def test_on_cuda_the_captured_step_equals_the_host_driven_search(lm_weight: float) -> None:
    model = decoder(1, lm=True)
    for scorer in (model.acoustic.scorer, *model.language_models):
        scorer.model.to("cuda")
        scorer.device = torch.device("cuda")
    states = random_encoder_output(model.acoustic, 3, 6).to("cuda")
    own = model.sources(states, DecodingOptions(beam_size=4, n_best=4, lm_weight=lm_weight, **OPTIONS))
    programs = DevicePrograms()
    ours = device_search(own.scorers, own.contexts, own.plan, StageClock(), programs)
    (program,) = programs._known.values()
    assert program.is_captured
    assert_same_outcomes(ours, search(own.scorers, own.contexts, own.names, own.plan, StageClock()))
    again = device_search(own.scorers, own.contexts, own.plan, StageClock(), programs)
    assert_same_outcomes(again, ours)


def test_timestamps_leave_the_language_model_where_it_was() -> None:
    """Its part of a text token is what it says of the text alone; a timestamp costs what its favourite costs."""
    model = decoder(1, lm=True)
    lm = model.language_models[0]
    states = random_encoder_output(model.acoustic, 4, 3)
    checked = 0
    for result in model.decode(states, beam_size=3, n_best=3, lm_weight=0.5, **OPTIONS):
        for hypothesis in result.n_best:
            read = [END]
            for token in hypothesis.tokens:
                with torch.inference_mode():
                    log_probs = torch.log_softmax(lm.model(input_ids=torch.tensor([read])).logits[0, -1], dim=-1)
                if token.id < TEXT_TOKENS:
                    assert token.parts["lm"] == pytest.approx(float(log_probs[token.id]), abs=1e-3)
                    read.append(token.id)
                    checked += len(read) > 2
                elif token.id >= BEGIN:
                    assert token.parts["lm"] == pytest.approx(float(log_probs.max()), abs=1e-3)
    assert checked >= 5


@pytest.mark.parametrize(
    "options",
    [
        {"rule": fusion.entropy_gate(0.3)},
        {"rule": fusion.uadf()},
        {"rule": fusion.internal_lm(0.4, 0.2)},
        {"rule": fusion.piecewise(0.3, initial_steps=2, catch_up=True)},
        {"rule": fusion.by_class(fusion.static(0.4), timestamps=0.0)},
        {"rule": fusion.delayed(0.4, unit="tokens")},
        {"hotwords": {"0712": 2.0}},
        {"initial_prompt": "0308"},
    ],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_every_rule_goes_with_timestamps(options: dict[str, Any]) -> None:
    model = MODELS[0]
    if "initial_prompt" in options:
        tokens = dataclasses.replace(model.acoustic.tokens, previous=START)
        model = FusionDecoder(dataclasses.replace(model.acoustic, tokens=tokens), model.language_models)
    states = random_encoder_output(model.acoustic, 3, 2)
    for result in model.decode(states, beam_size=3, n_best=3, **OPTIONS, **options):
        for hypothesis in result.n_best:
            assert_well_timed(hypothesis)


def test_timestamps_are_nothing_to_a_ctc_head() -> None:
    """It says 0 nats of them, and its part of a finished text is that of the text alone."""
    joint = FusionDecoder(dataclasses.replace(acoustic(1), ctc_head=tiny_head(1)))
    states = random_encoder_output(joint.acoustic, 3, 2)
    finished = 0
    for i, result in enumerate(joint.decode(states, beam_size=3, n_best=3, ctc_weight=0.3, **OPTIONS)):
        for hypothesis in result.n_best:
            assert_well_timed(hypothesis)
            assert all(token.parts["ctc"] == 0.0 for token in hypothesis.tokens if token.id >= BEGIN)
            if hypothesis.ended:
                text = [token for token in hypothesis.token_ids if token < TEXT_TOKENS]
                wanted = ctc_log_prob(joint, states[i : i + 1], text)
                assert hypothesis.parts["ctc"] == pytest.approx(wanted, abs=1e-3)
                finished += 1
    assert finished


def test_sessions_give_the_same_segments() -> None:
    model = MODELS[1]
    states = random_encoder_output(model.acoustic, 4, 9)
    options = {**OPTIONS, "beam_size": 3, "lm_weight": 0.3}
    plain = {name: value for name, value in options.items() if name != "without_timestamps"}
    expected = [model.decode(own[None], **options)[0] for own in states]
    with model.session() as session:
        timed = [session.submit(own, **options) for own in states]
        untimed = [session.submit(own, **plain) for own in states]  # in the same passes
        for future, wanted in zip(timed, expected, strict=True):
            assert future.result().best.token_ids == wanted.best.token_ids
            assert future.result().segments == wanted.segments
        assert all(future.result().best.spans is None for future in untimed)


def test_results_take_every_shape() -> None:
    model = MODELS[0]
    results = model.decode(random_encoder_output(model.acoustic, 6, 1), beam_size=3, **OPTIONS)
    assert any(len(result.segments) > 1 for result in results)
    for result in results:
        segments = result.segments
        assert "".join(segment.text for segment in segments) == result.text
        assert all(0.0 <= s.start < s.end for s in segments)
        assert all(one.end <= two.start for one, two in pairwise(segments))
        assert all(max(s.tokens) < BEGIN for s in segments)
        listed = [{"start": s.start, "end": s.end, "text": s.text} for s in segments]
        assert result.to_json()["segments"] == listed
        assert [s["start"] for s in result.to_whisper()["segments"]] == [s.start for s in segments]
        assert [c["timestamp"] for c in result.to_transformers()["chunks"]] == [(s.start, s.end) for s in segments]
        assert result.rerank(fusion.static(0.0)).segments == segments
        means = [s.avg_logprob * len(s.tokens) for s in segments]
        text = [t.parts["asr"] for t in result.best.tokens if t.id < BEGIN and t.id != END]
        assert sum(means) == pytest.approx(sum(text), abs=1e-4)
        assert all(t.text == "" for t in result.best.tokens if t.id >= BEGIN)


def test_a_model_without_timestamp_tokens_is_refused() -> None:
    model = FusionDecoder(tiny_whisper(1, timestamps=0))
    assert model.acoustic.tokens.num_timestamps == 0
    states = random_encoder_output(model.acoustic, 1)
    with pytest.raises(InvalidArgumentError, match="needs timestamp tokens, which tiny whisper does not have"):
        model.decode(states, without_timestamps=False)
    with model.session() as session, pytest.raises(InvalidArgumentError, match="needs timestamp tokens"):
        session.submit(states[0], without_timestamps=False)
    assert tiny_decoder(1).acoustic.tokens.num_timestamps == 1
