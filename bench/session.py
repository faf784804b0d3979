"""Continuous batching: utterances of uneven lengths through a session, in static batches, and one by one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from bench.decode import SHAPES, WEIGHT, make_pair
from bench.timing import Measurement, measurements, take_turns

__all__ = ["run"]

SLOTS = 8
EVEN = "session, even lengths"


@dataclass
class Work:
    """Utterances with as many tokens as each is to have, and what became of the passes.

    Args:
        counts: "row_steps" and "live_rows" of the latest run of each provider.
        waits: seconds from arrival to result.
        driver: who is asked to drive the searches.
    """

    decoder: object
    states: Tensor
    lengths: Sequence[int]
    beams: Sequence[int]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    waits: dict[str, list[float]] = field(default_factory=dict)
    driver: str = "host"

    def options(self, place: int) -> object:
        from shallowfusion import DecodingOptions

        tokens = self.lengths[place]
        return DecodingOptions(
            beam_size=self.beams[place], min_new_tokens=tokens, max_new_tokens=tokens, lm_weight=WEIGHT,
            end_policy="asr_only", end_threshold=None, suppress_blank=False, suppress_tokens=None,
            driver=self.driver,
        )  # fmt: skip


def uneven_lengths(count: int, quick: bool) -> list[int]:
    """Tokens per utterance: log-normal about 18, from 4 to 72, as utterances of 1 to 25 s are."""
    drawn = np.random.default_rng(5).lognormal(np.log(6 if quick else 18), 0.75, count)
    return np.clip(np.round(drawn), 2 if quick else 4, 12 if quick else 72).astype(int).tolist()


def through_session(work: Work, name: str, gaps: Sequence[float] = (), width: int = SLOTS) -> list[tuple[int, ...]]:
    """Submit all at once, or with gaps in seconds between them."""
    arrived, done = [], []
    with work.decoder.session(max_utterances=width, encoder_batch=width) as session:  # type: ignore[attr-defined]
        for place, encoded in enumerate(work.states):
            if gaps:
                time.sleep(gaps[place])
            arrived.append(time.perf_counter())
            future = session.submit(encoded, work.options(place))
            future.add_done_callback(lambda _, at=arrived[-1]: work.waits.setdefault(name, []).append(_since(at)))
            done.append(future)
        found = [future.result().best.token_ids for future in done]
    work.counts[name] = dict(session.statistics().counts)
    return found


def _since(start: float) -> float:
    return time.perf_counter() - start


def static_batches(work: Work, name: str, width: int = SLOTS) -> list[tuple[int, ...]]:
    """Batches of which nobody enters before all have left; those that end early leave all the same."""
    return _searched(
        work, name, [range(i, min(i + width, len(work.states))) for i in range(0, len(work.states), width)]
    )


def _searched(work: Work, name: str, batches: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    from shallowfusion.search.loop import StageClock
    from shallowfusion.search.running import RunningSearches

    clock, found = StageClock(), []
    for batch in batches:
        running, cohorts = RunningSearches(clock), []
        for place in batch:
            own = work.decoder.sources(work.states[place : place + 1], work.options(place))  # type: ignore[attr-defined]
            cohorts.append(running.admit(own.scorers, own.contexts, own.names, own.plan, own.late))
        while running.num_running:
            running.step()
        found += [cohort.beams.results(0, 1)[0].token_ids for cohort in cohorts]
    work.counts[name] = {**clock.counts, "fusion_ms": round(1e3 * clock.seconds["fusion"]), "steps": clock.calls["asr"]}
    return found


def one_cohort(work: Work, name: str) -> list[tuple[int, ...]]:
    """`decode`: all utterances share plan and fused step."""
    results = work.decoder.decode(work.states, work.options(0))  # type: ignore[attr-defined]
    work.counts[name] = {"fusion_ms": round(1e3 * results[0].timing.stages["fusion"])}
    return [result.best.token_ids for result in results]


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Uneven lengths, beams of several sizes, and what it costs to enter one by one; equal tokens come first."""
    shape = "tiny" if quick else "whisper-base.en+gpt2"
    pair = make_pair(SHAPES[shape], device)
    frames, width = SHAPES[shape].frames, SHAPES[shape].width
    count = 12 if quick else 32
    states = torch.randn((count, frames, width), generator=torch.Generator().manual_seed(1)).to(device)
    lengths = uneven_lengths(count, quick)
    work = Work(pair.fused, states, lengths, [5] * count)
    yield list(_uneven(work, shape, device))
    yield list(_full(work, shape, turns=1 if quick else 2))
    if quick or device != "cpu":  # a device's step on a CPU is for tests
        yield list(_drivers(work, shape, device))
    mixed = Work(pair.fused, states[:SLOTS], [6 if quick else 16] * SLOTS, [1, 5, 2, 10, 5, 1, 5, 4])
    yield list(_beams(mixed, shape, device))
    alike = Work(pair.fused, states[:SLOTS], [6 if quick else 16] * SLOTS, [5] * SLOTS)
    yield list(_cohorts(alike, shape, device))
    yield list(shipped_overlap(device, quick))
    whole = make_pair(replace(SHAPES[shape], encoder_layers=SHAPES[shape].layers), device)
    few = Work(whole.fused, states[: count // 2], lengths[: count // 2], [5] * (count // 2))
    yield list(_shape_overlap(few, shape, device))


def _uneven(work: Work, shape: str, device: str) -> Iterator[Measurement]:
    count = len(work.states)
    mean = sum(work.lengths) // count
    even = Work(work.decoder, work.states, [mean] * count, work.beams)
    through_session(even, "even")
    providers = {
        "session": lambda: through_session(work, "session"),
        "static batches": lambda: static_batches(work, "static batches"),
        "one by one": lambda: static_batches(work, "one by one", width=1),
    }
    _check(providers)
    timed: dict[str, Callable[[], object]] = {**providers, EVEN: lambda: through_session(even, "even")}
    seconds = take_turns(timed, repeats=1 if count > 12 else 2, warm_up=0, device=device)
    batches = [work.lengths[i : i + SLOTS] for i in range(0, count, SLOTS)]
    kept = sum(work.lengths) / sum(max(batch) * len(batch) for batch in batches)
    notes = {"static batches": f"efficiency {_efficiency(work, 'static batches')}, {kept:.2f} if nobody left early"}
    for name in ("session", "one by one"):
        notes[name] = f"efficiency {_efficiency(work, name)}"
    rates = [sum(own.lengths) / float(np.median(seconds[key])) for own, key in ((work, "session"), (even, EVEN))]
    notes["session"] += f", {rates[0] / rates[1]:.2f} of the tokens per second of even lengths"
    notes[EVEN] = f"efficiency {_efficiency(even, 'even')}"
    for name in notes:
        notes[name] += f", {count / float(np.median(seconds[name])):.3g} utterances/s"
    where = f"{shape} utterances={count} places={SLOTS} beams=5 tokens={min(work.lengths)}-{max(work.lengths)}"
    yield from measurements("session", where, "float32", seconds, "session", note=notes)
    gap = float(np.median(seconds["session"])) / count
    gaps = np.random.default_rng(6).exponential(gap, count).tolist()
    work.waits.clear()
    seconds = {"session, arrivals": [_timed(lambda: through_session(work, "session, arrivals", gaps))]}
    waits = sorted(work.waits["session, arrivals"])
    note = (
        f"efficiency {_efficiency(work, 'session, arrivals')}, wait median {1e3 * float(np.median(waits)):.0f} ms, "
        f"longest {1e3 * waits[-1]:.0f} ms"
    )
    where += f" mean gap={1e3 * gap:.0f} ms"
    name = "session, arrivals"
    yield from measurements("session", where, "float32", seconds, name, note={name: note})


def _full(work: Work, shape: str, turns: int) -> Iterator[Measurement]:
    """Processor time per token as long as a queue fills every place at once, without the end where few run."""
    count = len(work.states)
    mean = sum(work.lengths) // count
    even = Work(work.decoder, work.states, [mean] * count, work.beams)
    given = {"kept full, uneven lengths": work, "kept full, even lengths": even}
    found: dict[str, list[Full]] = {name: [] for name in given}
    for turn in range(turns + 1):
        for name, own in given.items():
            full = kept_full(own)
            if turn:
                found[name].append(full)
    seconds = {
        name: [full.steps / full.tokens + full.admissions / count / mean for full in own] for name, own in found.items()
    }
    notes = {}
    for name, own in found.items():
        step, newcomer = (
            float(np.median([1e3 * each for each in every]))
            for every in ([full.steps / full.num_steps for full in own], [full.admissions / count for full in own])
        )
        notes[name] = (
            f"processor time of a token, its share of the newcomer's included; step {step:.0f} ms, newcomer "
            f"{newcomer:.0f} ms, {own[0].fused_steps / own[0].num_steps:.2f} fused steps a step"
        )
    where = f"{shape} utterances={count} places={SLOTS} beams=5 tokens={min(work.lengths)}-{max(work.lengths)}"
    yield from measurements("session", where, "float32", seconds, "kept full, uneven lengths", note=notes)


@dataclass(frozen=True)
class Full:
    """What it took while every place was taken: processor seconds of steps and of those that entered."""

    steps: float
    admissions: float
    tokens: int
    num_steps: int
    fused_steps: int


def kept_full(work: Work) -> Full:
    """Whoever leaves is followed by the next in the queue; the clock stops when there is none."""
    from shallowfusion.search.loop import StageClock
    from shallowfusion.search.running import RunningSearches

    clock = StageClock()
    running, queue = RunningSearches(clock), list(range(len(work.states)))
    steps = admissions = 0.0
    tokens = num_steps = 0
    while True:
        start = time.process_time()
        while queue and running.num_running < SLOTS:
            place = queue.pop(0)
            own = work.decoder.sources(work.states[place : place + 1], work.options(place))  # type: ignore[attr-defined]
            running.admit(own.scorers, own.contexts, own.names, own.plan, own.late)
        admissions += time.process_time() - start
        if running.num_running < SLOTS:
            break
        start, num_running = time.process_time(), running.num_running
        running.step()
        steps, tokens, num_steps = steps + time.process_time() - start, tokens + num_running, num_steps + 1
    found = Full(steps, admissions, tokens, num_steps, int(clock.counts["fused_steps"]))
    while running.num_running:
        running.step()
    return found


def _drivers(work: Work, shape: str, device: str) -> Iterator[Measurement]:
    """The host's steps or the device's, in sessions that are open and have searched the longest before: no capture."""
    asked = {driver: replace(work, driver=driver) for driver in ("host", "device")}
    longest = int(np.argmax(work.lengths))
    with ExitStack() as opened:
        sessions = {
            driver: opened.enter_context(work.decoder.session(max_utterances=SLOTS, encoder_batch=SLOTS))  # type: ignore[attr-defined]
            for driver in asked
        }

        def through(driver: str) -> list[tuple[int, ...]]:
            own, session = asked[driver], sessions[driver]
            done = [session.submit(encoded, own.options(place)) for place, encoded in enumerate(own.states)]
            found = [future.result() for future in done]
            if {result.timing.driver for result in found} != {driver}:
                raise AssertionError(f"not driven by the {driver}: no speed is reported")
            return [result.best.token_ids for result in found]

        for driver, own in asked.items():
            sessions[driver].submit(own.states[longest], own.options(longest)).result()
        providers = {f"{driver}-driven": lambda d=driver: through(d) for driver in asked}
        _check(providers)
        seconds = take_turns(providers, repeats=3, warm_up=0, device=device)
    tokens = sum(work.lengths)
    notes = {name: f"{tokens / float(np.median(own)):.3g} tokens/s" for name, own in seconds.items()}
    where = (
        f"{shape} utterances={len(work.states)} places={SLOTS} beams=5 tokens={min(work.lengths)}-{max(work.lengths)}"
    )
    yield from measurements("session", where, "float32", seconds, "host-driven", note=notes)


def _beams(work: Work, shape: str, device: str) -> Iterator[Measurement]:
    """Utterances of several beam sizes in one pass, over their own rows or as many for each as the widest has."""
    padded = Work(PaddedDecoder(work.decoder), work.states, work.lengths, work.beams)
    given = {"rows laid end to end": work, "padded to the widest": padded}
    spent: dict[str, list[float]] = {}
    providers = {name: lambda n=name, w=own: _clocked(spent, w, n) for name, own in given.items()}
    _check(providers)
    seconds = take_turns(providers, repeats=3, warm_up=0, device=device)
    notes = {
        name: f"efficiency {_efficiency(own, name)}, {float(np.median(spent[name][1:])):.3g} processor s"
        for name, own in given.items()
    }
    where = f"{shape} utterances={len(work.states)} beams={','.join(map(str, work.beams))} tokens={work.lengths[0]}"
    yield from measurements("session", where, "float32", seconds, "rows laid end to end", note=notes)


class PaddedDecoder:
    """A decoder whose scorers compute as many rows for every utterance as the widest beam of a pass has."""

    def __init__(self, decoder: object) -> None:
        self.decoder = decoder
        self.own: dict[int, object] = {}

    def sources(self, states: Tensor, options: object) -> object:
        found = self.decoder.sources(states, options)  # type: ignore[attr-defined]
        return replace(found, scorers=[self.own.setdefault(id(scorer), _padded(scorer)) for scorer in found.scorers])


def _padded(scorer: object) -> object:
    """The same over the same model, without knowledge that its attention can do with packed rows."""
    kind = type(scorer)
    other = copy.copy(scorer)
    other.__class__ = type(f"Padded{kind.__name__}", (kind,), {"packs_rows": False})
    return other


def _clocked(spent: dict[str, list[float]], work: Work, name: str) -> list[tuple[int, ...]]:
    """All at once, and the processor seconds it took."""
    start = time.process_time()
    found = _searched(work, name, [range(len(work.states))])
    spent.setdefault(name, []).append(time.process_time() - start)
    return found


def _cohorts(work: Work, shape: str, device: str) -> Iterator[Measurement]:
    """What it costs that utterances which did not start together have entered one by one."""
    places = range(len(work.states))
    providers = {
        "entered together": lambda: one_cohort(work, "entered together"),
        "entered one by one": lambda: _searched(work, "entered one by one", [places]),
    }
    _check(providers)
    seconds = take_turns(providers, repeats=3, warm_up=0, device=device)
    notes = {name: f"fusion {work.counts[name]['fusion_ms']} ms of it" for name in providers}
    where = f"{shape} utterances={len(work.states)} beams=5 tokens={work.lengths[0]}"
    yield from measurements("session", where, "float32", seconds, "entered together", note=notes)


def shipped_overlap(device: str, quick: bool) -> Iterator[Measurement]:
    """The clips and models of the package."""
    from shallowfusion import DecodingOptions, FusionDecoder
    from shallowfusion.demo.shipped import HERE, model_directory

    decoder = FusionDecoder.from_pretrained(model_directory("asr"), lm=model_directory("lm_medical"), device=device)
    clips = sorted((HERE / "clips").glob("*.flac"))[: 4 if quick else None]
    asked = [DecodingOptions(beam_size=5, lm_weight=0.8)] * len(clips)
    yield from _overlap(decoder, clips, asked, "shipped models", device)


def _shape_overlap(work: Work, shape: str, device: str) -> Iterator[Measurement]:
    draw = torch.Generator().manual_seed(7)
    window = work.decoder.acoustic.features.chunk_samples  # type: ignore[attr-defined]
    sounds = [0.1 * torch.randn(max(400, round(window * own / 72)), generator=draw) for own in work.lengths]
    yield from _overlap(work.decoder, sounds, [work.options(i) for i in range(len(sounds))], shape, device)


def _overlap(
    decoder: object, sounds: Sequence[object], asked: Sequence[object], shape: str, device: str
) -> Iterator[Measurement]:
    """Recordings read and encoded between the steps of the search, or ahead of it in a thread of their own.

    The second can only be faster where a core, or a share of the device, is idle; processor seconds say what it costs.
    """
    spent: dict[str, list[float]] = {}

    def through(name: str, ahead: bool) -> list[tuple[int, ...]]:
        start = time.process_time()
        with decoder.session(max_utterances=SLOTS, overlap_encoder=ahead) as session:  # type: ignore[attr-defined]
            done = [session.submit(sound, own) for sound, own in zip(sounds, asked, strict=True)]
            found = [future.result().best.token_ids for future in done]
        spent.setdefault(name, []).append(time.process_time() - start)
        return found

    providers = {
        name: lambda n=name, a=ahead: through(n, a)
        for name, ahead in {"encoded between steps": False, "encoded ahead": True}.items()
    }
    _check(providers)
    seconds = take_turns(providers, repeats=2 if len(sounds) < 8 else 5, warm_up=0, device=device)
    notes = {
        name: f"{len(sounds) / float(np.median(own)):.3g} recordings/s, "
        f"{float(np.median(spent[name][1:])):.3g} processor s"
        for name, own in seconds.items()
    }
    where = f"{shape} recordings={len(sounds)} places={SLOTS} encoder_batch=4 beams=5"
    yield from measurements("session", where, "float32", seconds, "encoded between steps", note=notes)


def _check(providers: dict[str, Callable[[], list[tuple[int, ...]]]]) -> None:
    """A first run of each; different tokens stop everything."""
    if len({str(call()) for call in providers.values()}) != 1:
        raise AssertionError("hypotheses differ: no speed is reported")


def _efficiency(work: Work, name: str) -> str:
    counts = work.counts[name]
    return f"{counts['live_rows'] / counts['row_steps']:.2f}"


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return _since(start)
