"""Device-driven searches give what host-driven ones give; on the CPU the same step runs without a graph."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

from shallowfusion import DecodingOptions, fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.kernels.beam_advance_arrays import RING_ENTRIES
from shallowfusion.scorers.attention import set_slot_attention
from shallowfusion.search.device_loop import DevicePrograms, bucket, device_search, program_bytes, refusal, slot_bytes
from shallowfusion.search.loop import SearchOutcome, StageClock, search
from tests.tiny import DEVICES, TEXT_TOKENS, decoder_on, random_encoder_output, tiny_decoder, tiny_lm, tiny_whisper

OPTIONS: dict[str, Any] = {
    "suppress_blank": False, "suppress_tokens": None, "max_new_tokens": 12, "beam_size": 4, "n_best": 4,
}  # fmt: skip


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest) -> FusionDecoder:
    return decoder_on(request.param)


def states_of(model: FusionDecoder, utterances: int, seed: int = 0) -> torch.Tensor:
    return random_encoder_output(model.acoustic, utterances, seed).to(model.acoustic.scorer.device)


def assert_same(ours: Any, theirs: Any) -> None:
    """Token for token; totals to the rounding that other batch shapes cause."""
    for mine, wanted in zip(ours, theirs, strict=True):
        assert [h.token_ids for h in mine.n_best] == [h.token_ids for h in wanted.n_best]
        for one, other in zip(mine.n_best, wanted.n_best, strict=True):
            assert one.flags == other.flags
            assert one.total == pytest.approx(other.total, abs=1e-4)
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert one.parts == pytest.approx(other.parts, abs=1e-4)
            assert [t.total for t in one.tokens] == pytest.approx([t.total for t in other.tokens], abs=1e-4)


def both(model: FusionDecoder, states: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    chosen = {**OPTIONS, **options}
    ours = model.decode(states, driver="device", **chosen)
    assert ours[0].timing.counts["device steps"] >= 1
    return ours, model.decode(states, driver="host", **chosen)


@pytest.mark.parametrize("end_policy", ["end_factored", "neutral", "lm", "asr_only"])
@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_equals_the_host_driven_search(model: FusionDecoder, stop_rule: str, end_policy: str) -> None:
    assert_same(*both(model, states_of(model, 5), stop_rule=stop_rule, end_policy=end_policy, lm_weight=0.4))


@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 1, "n_best": 1},
        {"beam_size": 10, "n_best": 10, "length_penalty": 0.6},
        {"stop_rule": "whisper", "patience": 2.0, "length_penalty": None},
        {"stop_rule": "whisper", "length_penalty": 0.7},
        {"early_stopping": True, "length_bonus": 0.5},
        {"early_stopping": "never", "length_penalty": -1.0},
        {"min_new_tokens": 5, "suppress_tokens": (3, 7, 40)},
        {"min_new_tokens": 4, "suppress_blank": True},
        {"end_threshold": None, "end_policy": "lm"},
        {"end_threshold": 1.1, "asr_temperature": 1.3, "lm_temperature": 0.8},
        {"rule": fusion.piecewise(0.6, initial_steps=2, ramp=3)},
        {"lm_weight": 0.0},
        {"max_new_tokens": 1},
        {"max_new_tokens": None},
    ],
    ids=lambda options: ",".join(options),
)
def test_equals_the_host_driven_search_under_every_option(model: FusionDecoder, options: dict[str, Any]) -> None:
    asked = {} if "rule" in options else {"lm_weight": 0.3}
    assert_same(*both(model, states_of(model, 3, seed=2), **{**asked, **options}))


@pytest.mark.parametrize(
    ("attention", "device"),
    [
        ("reference", "cpu"),
        ("sdpa", "cpu"),
        pytest.param("triton", "cpu", marks=pytest.mark.slow),
        pytest.param("sdpa", "cuda", marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("stop_rule", ["hf", "whisper"])
def test_attention_over_the_slot_tables_of_the_device(attention: Any, device: str, stop_rule: str) -> None:
    """The tables that the step keeps are read as they are: no mask is made, and the tokens are those of plain SDPA."""
    interpreted = device == "cpu" and attention == "triton"
    model, plain = decoder_on(device), decoder_on(device)
    for scorer in (model.acoustic.scorer, *model.language_models):
        set_slot_attention(scorer.model, attention)
    states = states_of(model, 2 if interpreted else 5, seed=7)
    options = {**OPTIONS, "stop_rule": stop_rule, "lm_weight": 0.4, "max_new_tokens": 6 if interpreted else 12}
    ours = model.decode(states, driver="device", **options)
    assert ours[0].timing.counts["device steps"] >= 1
    (program,) = model.programs._known.values()
    for decoder in program.step.decoders:
        assert decoder.reads_table
        assert decoder.visible.stride()[-1] == 0
    assert device == "cpu" or program.is_captured
    assert_same(ours, plain.decode(states, driver="host", **options))
    if not interpreted:  # a second batch finds nothing of the first
        again = states_of(model, 4, seed=8)
        found = model.decode(again, driver="device", **options)
        assert_same(found, plain.decode(again, driver="host", **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_random_models_alone_and_fused(device: str, seed: int) -> None:
    model = decoder_on(device, seed + 10)
    rule = ("hf", "whisper", "espnet")[seed % 3]
    assert_same(*both(model, states_of(model, 2, seed), stop_rule=rule, lm_weight=0.5, max_new_tokens=20))
    alone = FusionDecoder(model.acoustic)
    assert_same(*both(alone, states_of(model, 2, seed), stop_rule=rule, max_new_tokens=20))


def test_tokens_the_lm_lacks_leave_it_where_it_was(model: FusionDecoder) -> None:
    """Special tokens without counterpart are generated here, and the text goes on after them."""
    states = states_of(model, 6, seed=4)
    ours, theirs = both(
        model, states, lm_weight=0.4, min_new_tokens=11, suppress_tokens=tuple(range(0, TEXT_TOKENS, 2))
    )
    special = [h.token_ids for r in theirs for h in r.n_best if any(t > TEXT_TOKENS for t in h.token_ids[:-1])]
    assert special
    assert_same(ours, theirs)


def outcomes(model: FusionDecoder, states: torch.Tensor, device_driven: bool, **options: Any) -> list[SearchOutcome]:
    """A search by kernels alone: K1, K2 and K3 in Triton's interpreter where there is no GPU."""
    own = model.sources(states, DecodingOptions(**{**OPTIONS, **options}))
    plan = dataclasses.replace(own.plan, backend="triton" if device_driven else own.plan.backend)
    if device_driven:
        return device_search(own.scorers, own.contexts, plan, StageClock(), DevicePrograms())
    return search(own.scorers, own.contexts, own.names, plan, StageClock())


@pytest.mark.slow
@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_kernels_alone_equal_the_host_driven_search(model: FusionDecoder, stop_rule: str) -> None:
    options = {"stop_rule": stop_rule, "lm_weight": 0.4, "beam_size": 2, "n_best": 2, "max_new_tokens": 5}
    states = states_of(model, 2 if stop_rule == "hf" else 1, seed=6)
    ours, theirs = (outcomes(model, states, driven, **options) for driven in (True, False))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert [h.token_ids for h in mine.hypotheses] == [h.token_ids for h in wanted.hypotheses]
        for one, other in zip(mine.hypotheses, wanted.hypotheses, strict=True):
            assert (one.ended, one.forced) == (other.ended, other.forced)
            assert one.total == pytest.approx(other.total, abs=1e-4)


def test_nan_ends_one_utterance_and_not_its_neighbours_nor_a_later_batch(model: FusionDecoder) -> None:
    states = states_of(model, 3)
    clean = model.decode(states, driver="device", lm_weight=0.3, **OPTIONS)
    broken = states.clone()
    broken[1] = float("nan")
    found = model.decode(broken, driver="device", lm_weight=0.3, **OPTIONS)
    assert "nan" in found[1].n_best[0].flags
    assert_same([found[0], found[2]], [clean[0], clean[2]])
    assert_same(model.decode(states, driver="device", lm_weight=0.3, **OPTIONS), clean)


def test_a_search_longer_than_the_ring() -> None:
    model = FusionDecoder(tiny_whisper(1, positions=128), [tiny_lm(2, positions=128)])
    options = {"min_new_tokens": 70, "max_new_tokens": 80, "beam_size": 2, "n_best": 2, "lm_weight": 0.2}
    ours, theirs = both(model, states_of(model, 1), **options)
    assert ours[0].timing.counts["device steps"] > RING_ENTRIES
    assert_same(ours, theirs)


def test_prompts_of_different_lengths(model: FusionDecoder) -> None:
    own = model.sources(states_of(model, 3), DecodingOptions(**OPTIONS))
    prompts = [[41, 42], [7, 9, 11, 41, 42], [41]]
    contexts = [
        dataclasses.replace(own.contexts[0], prompts=prompts),
        dataclasses.replace(own.contexts[1], prompts=[[40], [40, 3], [40, 5, 6, 7]]),
    ]
    ours = device_search(own.scorers, contexts, own.plan, StageClock(), DevicePrograms())
    theirs = search(own.scorers, contexts, own.names, own.plan, StageClock())
    for mine, wanted in zip(ours, theirs, strict=True):
        assert [h.token_ids for h in mine.hypotheses] == [h.token_ids for h in wanted.hypotheses]


def test_the_bytes_of_a_program_are_known_before(model: FusionDecoder) -> None:
    own = model.sources(states_of(model, 3), DecodingOptions(**OPTIONS))
    programs = DevicePrograms()
    device_search(own.scorers, own.contexts, own.plan, StageClock(), programs)
    (program,) = programs._known.values()
    layers = [layer for decoder in program.step.decoders for layer in decoder._own.layers]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    capacities = [decoder.capacity for decoder in program.step.decoders]
    assert held == slot_bytes(own.scorers, capacities, places=4)
    assert program.step.num_bytes == program_bytes(own.scorers, own.plan, program.step.rooms) > held


def test_programs_are_used_again_and_the_oldest_goes() -> None:
    model = tiny_decoder(1)
    programs = DevicePrograms(most=2)

    def run(utterances: int, **options: Any) -> list[SearchOutcome]:
        own = model.sources(states_of(model, utterances), DecodingOptions(**{**OPTIONS, **options}))
        return device_search(own.scorers, own.contexts, own.plan, StageClock(), programs)

    first = run(3)
    step = next(iter(programs._known.values())).step
    again = run(4)  # the same bucket
    assert len(programs) == 1
    assert next(iter(programs._known.values())).step is step
    assert [h.token_ids for h in first[0].hypotheses] == [h.token_ids for h in again[0].hypotheses]
    run(2)
    run(3, beam_size=5)
    assert len(programs) == 2
    assert all(program.step is not step for program in programs._known.values())
    programs.resize(1)
    assert len(programs) == 1
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        programs.resize(0)
    assert [bucket(count) for count in (1, 3, 8, 33, 65, 129)] == [1, 4, 8, 64, 128, 192]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_searches_that_differ_in_numbers_share_a_program(device: str, stop_rule: str) -> None:
    """Each still gives what its own host-driven search gives, whatever ran before it."""
    model = decoder_on(device)
    states, penalty = states_of(model, 3, seed=5), None if stop_rule == "whisper" else 1.0
    asked: list[dict[str, Any]] = [
        *({"lm_weight": weight} for weight in (0.1, 0.2, 0.3, 0.5, 0.8)),
        {"lm_weight": 0.4, "length_bonus": 0.7, "length_penalty": 0.6},
        {"lm_weight": 0.4, "max_new_tokens": 9, "suppress_tokens": (5, 11)},
        {"rule": fusion.piecewise(0.6, initial_steps=2, ramp=3), "min_new_tokens": 3, "suppress_tokens": (2,)},
        {"lm_weight": 0.3, "early_stopping": "never", "min_new_tokens": 6, "suppress_tokens": (2, 9)},
        {"lm_weight": 0.1},
    ]
    for options in asked:
        common = {"stop_rule": stop_rule, "length_penalty": penalty, "suppress_tokens": (1,), **options}
        if stop_rule != "hf":
            common.pop("early_stopping", None)
        assert_same(*both(model, states, **common))
        assert len(model.programs) == 1
    both(model, states, lm_weight=0.1, stop_rule=stop_rule, length_penalty=penalty, end_policy="end_factored")
    assert len(model.programs) == 2


def test_older_programs_make_room_and_a_device_too_small_is_refused() -> None:
    model = tiny_decoder(1)
    wide, narrow = (model.sources(states_of(model, n), DecodingOptions(**OPTIONS)) for n in (4, 1))
    free = [1e9]
    programs = DevicePrograms(free_bytes=lambda device: free[0])
    assert programs.refusal(wide.scorers, wide.contexts, wide.plan) is None
    device_search(wide.scorers, wide.contexts, wide.plan, StageClock(), programs)
    free[0] = 0.0
    assert programs.refusal(wide.scorers, wide.contexts, wide.plan) is None  # it is there already
    assert "GB free" in str(programs.refusal(narrow.scorers, narrow.contexts, narrow.plan))
    assert len(programs) == 0
    decoder = FusionDecoder(model.acoustic, model.language_models)
    decoder.programs = programs
    assert "device steps" not in decoder.decode(states_of(model, 1), driver="device", **OPTIONS)[0].timing.counts


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rule": fusion.entropy_gate(0.3)}, "gate"),
        ({"rule": fusion.uadf()}, "mixture"),
        ({"rule": fusion.piecewise(0.3, initial_steps=2, catch_up=True)}, "catches up"),
        ({"rule": fusion.internal_lm(0.3, 0.2)}, "InternalLMScorer"),
        ({"no_repeat_ngram_size": 3}, "repeated"),
        ({"hotwords": {"0712": 2.0}}, "phrases"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_device_cannot_drive_the_host_drives_and_says_why(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_decoder(1)
    states = states_of(model, 2)
    with caplog.at_level(logging.WARNING, logger="shallowfusion.search.drivers"):
        ours = model.decode(states, driver="device", **OPTIONS, **options)
    assert reason in caplog.text
    timing = ours[0].timing
    assert timing is not None
    assert "device steps" not in timing.counts
    assert timing.driver == "host"
    assert reason in str(timing.host_reason)
    assert reason in ours[0].to_json()["timing"]["host_reason"]
    assert_same(ours, model.decode(states, driver="host", **OPTIONS, **options))


def test_results_say_who_drove_and_what_each_part_took(model: FusionDecoder) -> None:
    ours, theirs = both(model, states_of(model, 2), lm_weight=0.3)
    assert (ours[0].timing.driver, ours[0].timing.host_reason) == ("device", None)
    assert set(ours[0].timing.stages) == {"prefill", "device step", "host", "text", "asr"}
    assert min(ours[0].timing.stages[stage] for stage in ("prefill", "device step")) > 0
    assert (theirs[0].timing.driver, theirs[0].timing.host_reason) == ("host", None)
    assert ours[0].to_json()["timing"]["driver"] == "device"


def test_warmed_up_decodes_find_their_program(model: FusionDecoder) -> None:
    decoder = FusionDecoder(model.acoustic, model.language_models)
    states = states_of(model, 3)
    spent = decoder.warm_up((1, 3), driver="device", lm_weight=0.3, **OPTIONS)
    assert list(spent) == [1, 3]
    assert min(spent.values()) > 0
    assert len(decoder.programs) == 2
    steps = [program.step for program in decoder.programs._known.values()]
    found = decoder.decode(states, driver="device", lm_weight=0.5, **OPTIONS)  # a weight it was not warmed up with
    assert [program.step for program in decoder.programs._known.values()] == steps
    assert_same(found, decoder.decode(states, driver="host", lm_weight=0.5, **OPTIONS))
    assert list(decoder.warm_up(2, lm_weight=0.3, **OPTIONS)) == [2]  # the host's way leaves no program
    assert len(decoder.programs) == 2
    with pytest.raises(InvalidArgumentError, match="utterances must be at least 1"):
        decoder.warm_up(0)


def test_a_window_too_short_is_refused() -> None:
    model = FusionDecoder(tiny_whisper(1), [tiny_lm(2, positions=9)])
    own = model.sources(states_of(model, 1), DecodingOptions(**OPTIONS))
    assert "outgrow the window of 9" in str(refusal(own.scorers, own.contexts, own.plan))


def test_auto_leaves_the_cpu_to_the_host_and_other_names_are_refused() -> None:
    model = tiny_decoder(1)
    assert "device steps" not in model.decode(states_of(model, 1), **OPTIONS)[0].timing.counts
    with pytest.raises(InvalidArgumentError, match="driver"):
        DecodingOptions(driver="gpu")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_cuda_a_step_is_one_captured_graph_and_nothing_is_allocated() -> None:
    model = decoder_on("cuda")
    own = model.sources(states_of(model, 3), DecodingOptions(**OPTIONS))
    programs = DevicePrograms()
    first = device_search(own.scorers, own.contexts, own.plan, StageClock(), programs)
    (program,) = programs._known.values()
    assert program.is_captured
    program.begin(own.contexts, own.plan)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(4):
        program.run()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    eager = device_search(own.scorers, own.contexts, own.plan, StageClock(), DevicePrograms(captures=False))
    for mine, wanted in zip(first, eager, strict=True):
        assert [h.token_ids for h in mine.hypotheses] == [h.token_ids for h in wanted.hypotheses]
