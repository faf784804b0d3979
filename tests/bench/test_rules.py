"""The comparison of the rules: what is chosen, kept and timed, on a few shipped recordings."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.rules import Progress, Set, Task, choose, run_trial
from bench.rules_gate import unguarded
from bench.rules_speed import take_turns, timed_trials
from bench.rules_trials import ALONE, Trial
from shallowfusion import FusionDecoder, fusion
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.learned_gate import GateNetwork, GateSettings, LearnedGate
from tests.shipped import decoder
from tests.training.worlds import HERE, ROWS

TRIALS = (
    Trial("static", fusion.static(0.2)),
    Trial("static", fusion.static(0.4)),
    Trial("internal LM", fusion.internal_lm(0.8, 0.2)),
    Trial("LODR", fusion.lodr(0.8, 0.2), decoder="source"),
)


def recordings(*numbers: int) -> Set:
    return Set(decoder(), [(HERE / "dev" / ROWS[i]["audio"], ROWS[i]["text"]) for i in numbers])


def small_task() -> Task:
    twice = FusionDecoder(decoder().acoustic, [*decoder().language_models] * 2)
    named = {"right": decoder(), "right source": twice}
    return Task("small", named, recordings(1), recordings(2, 5), None, TRIALS, lambda: ALONE)


def kept(path: Path, *errors: int) -> Progress:
    progress = Progress(path)
    for trial, count in zip(TRIALS, errors, strict=False):
        progress.had(f"dev {trial.key}", lambda count=count: {"errors": count})
    return progress


def test_what_is_kept_is_not_decoded_again_and_the_fewest_errors_win(tmp_path: Path) -> None:
    kept(tmp_path / "kept.jsonl", 5, 3)
    before = (tmp_path / "kept.jsonl").read_text()
    task = Task("none", {}, recordings(1), recordings(2), None, TRIALS, lambda: ALONE)  # with no decoder at all
    chosen = choose(task, Progress(tmp_path / "kept.jsonl"), ["static"])
    assert chosen == {"static": TRIALS[1]}
    assert (tmp_path / "kept.jsonl").read_text() == before


def test_the_first_recordings_are_those_of_the_whole_set() -> None:
    whole = recordings(2, 5)
    few = whole.first(1)
    assert few.references == whole.references[:1]
    assert (few.states == whole.states[:1]).all()
    assert 0 < few.seconds < whole.seconds


def test_systems_take_turns_and_those_not_chosen_yet_are_left_out(tmp_path: Path) -> None:
    task = small_task()
    progress = kept(tmp_path / "kept.jsonl", 5, 3)
    trials = timed_trials(task, progress, tmp_path)
    assert [trial.key for trial in trials] == [ALONE.key, TRIALS[1].key]
    turns = Progress(tmp_path / "turns.jsonl")
    seconds = take_turns(task, task.test, trials, 2, turns)
    assert {name: len(own) for name, own in seconds.items()} == {"ASR alone": 2, "static": 2}
    assert all(own > 0 for times in seconds.values() for own in times)
    again = take_turns(task, task.test, trials, 2, Progress(tmp_path / "turns.jsonl"))
    assert again == seconds


def test_a_source_is_the_last_language_model() -> None:
    task = small_task()
    texts, seconds = run_trial(task.decoder("right", TRIALS[3]), task.test, TRIALS[3])
    found = task.decoders["right source"].decode(task.test.states, rule=TRIALS[3].rule, beam_size=5)
    assert texts == [result.text for result in found]
    assert all("ilm" in result.best.parts for result in found)
    assert seconds > 0


def test_a_gate_is_shown_to_other_models_on_purpose_alone() -> None:
    settings = GateSettings(largest_weight=0.8, first_weight=0.4)
    gate = LearnedGate(settings, GateNetwork(settings).eval(), ("another", "model"), form="plain")
    trial = Trial("learned gate", fusion.Rule("learned", (0.8,), gate=gate, form="plain"))
    own = recordings(2)
    with pytest.raises(InvalidArgumentError, match="was trained for models"):
        run_trial(decoder(), own, trial)
    texts, _ = run_trial(decoder(), own, unguarded(trial, decoder()))
    assert texts == run_trial(decoder(), own, Trial("static", fusion.static(0.4)))[0]
