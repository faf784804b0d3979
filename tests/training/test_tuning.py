"""The procedure of tune on tiny models: everything is decoded once, the choice is the best, a killed run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from shallowfusion import DecodingOptions, FusionDecoder
from shallowfusion.errors import InvalidArgumentError, ShallowFusionError
from shallowfusion.evaluation.manifest import read_manifest
from shallowfusion.evaluation.normalisation import normaliser
from shallowfusion.evaluation.scoring import ReferenceSet, evaluate
from shallowfusion.evaluation.stored import HypothesisStore
from shallowfusion.fusion import parse_rule
from shallowfusion.training.families import FAMILIES, drawn_rule
from shallowfusion.training.session import EncodedSet, TunedSet
from shallowfusion.training.tuning import Tuning, TuningSettings, tune
from shallowfusion.training.tuning_page import tuning_data, tuning_page
from tests.shipped import decoder
from tests.training.worlds import manifest

SETTINGS = TuningSettings(grid=(0.3, 0.8), num_trials=2, rules=("entropy_gate(0.9)",))
BASE = DecodingOptions(beam_size=3)


class Counted:
    """Counts decoded batches; dies after a number of them."""

    def __init__(self, most: int | None = None) -> None:
        self.titles: list[str] = []
        self.most = most

    def __call__(self, batches, title: str):
        for batch in batches:
            if self.most is not None and len(self.titles) >= self.most:
                raise KeyboardInterrupt
            self.titles.append(title)
            yield batch


def tuned(directory: Path, progress: Counted) -> tuple[Tuning, TunedSet]:
    recordings = read_manifest(manifest(directory / "dev.jsonl", 1, 5))
    encoded = EncodedSet(decoder(), directory / "encoded")
    encoded.make(recordings, progress, 8)
    with HypothesisStore(directory / "hypotheses.jsonl") as store:
        dev = TunedSet(decoder(), tuple(recordings), encoded, store, normaliser("basic"), progress)
        return tune(dev, BASE, SETTINGS), dev


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tuned")
    progress = Counted()
    return (*tuned(directory, progress), progress, directory)


def test_each_rule_is_decoded_once_and_the_fewest_errors_win(run) -> None:
    found, _, progress, _ = run
    assert progress.titles.count("encoding") == 1
    decoded = [title for title in progress.titles if title != "encoding"]
    keys = [(own.rule, repr(own.options)) for own in found.tried]
    assert len(set(keys)) == len(keys)
    assert len(decoded) <= 1 + len(keys)  # what offline and drawn rules share is decoded once
    assert found.chosen.num_errors == min(own.num_errors for own in found.tried)
    assert {own.origin for own in found.tried} == {"grid", "offline", "drawn", "given"}
    assert found.oracle <= min(own.num_errors for own in found.tried if own.origin == "grid")
    assert all(own.p_corrected >= own.p_value for own in found.tried)


def test_what_was_tried_is_what_a_plain_call_gives(run) -> None:
    found, dev, _, _ = run
    paths = [recording.audio for recording in dev.recordings]
    for own in (found.tried[0], found.chosen):
        assert list(own.texts) == [result.text for result in decoder().transcribe(paths, own.options)]
    alone = FusionDecoder(decoder().acoustic).transcribe(paths, BASE)
    assert list(found.baseline.texts) == [result.text for result in alone]


def test_a_killed_run_goes_on_without_decoding_anything_again(run, tmp_path: Path) -> None:
    found, _, whole, _ = run
    first = Counted(most=4)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, first)
    second = Counted()
    again, _ = tuned(tmp_path, second)
    assert len(first.titles) + len(second.titles) == len(whole.titles)
    assert [(own.rule, own.num_errors) for own in again.tried] == [(own.rule, own.num_errors) for own in found.tried]
    third = Counted()
    tuned(tmp_path, third)
    assert third.titles == []


def test_the_page_is_one_file_that_names_everything(run) -> None:
    found, dev, _, _ = run
    ids = tuple(recording.id for recording in dev.recordings)
    texts = {"acoustic model alone": found.baseline.texts, "chosen": found.chosen.texts}
    scored = evaluate(ReferenceSet(ids, tuple(dev.references), dev.normalise), texts)
    page = tuning_page(found, dev, scored, scored)
    for own in found.tried:
        assert own.rule.replace("'", "&#x27;") in page
    for change in scored.systems[1].comparison.changed:
        assert ids[change.position] in page
    assert page.count("<svg") == 1
    assert "prefers-color-scheme: dark" in page
    for outside in ("http:", "https:", "src=", "<script", "@import", "url("):
        assert outside not in page
    data = tuning_data(found, dev, scored)
    assert data["chosen"]["errors"] == found.chosen.num_errors
    assert len(data["tried"]) == len(found.tried)


class Middle:
    """The middle of every range."""

    def suggest_float(self, name, low, high, *, log=False):
        return (low + high) / 2

    def suggest_int(self, name, low, high):
        return (low + high) // 2

    def suggest_categorical(self, name, choices):
        return choices[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_models", [1, 3])
def test_every_family_draws_rules_that_parse(family: str, num_models: int) -> None:
    rule = parse_rule(drawn_rule(family, Middle(), num_models))
    assert rule.name == family
    assert len(rule.lm_weights) == num_models


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": (0.3,)}, "at least two"),
        ({"grid": (0.3, 0.3)}, "at least two different"),
        ({"grid": (0.0, 0.3)}, "above 0"),
        ({"num_trials": -1}, "num_trials"),
        ({"families": ("magic",)}, "unknown family 'magic'"),
        ({"families": ()}, "at least one rule"),
        ({"rules": ("magic(1)",)}, "unknown rule"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        TuningSettings(**changes)


def test_without_language_model_or_recording_nothing_is_tuned(tmp_path: Path) -> None:
    recordings = read_manifest(manifest(tmp_path / "dev.jsonl", 1))
    alone = FusionDecoder(decoder().acoustic)
    encoded = EncodedSet(alone, tmp_path / "encoded")
    with HypothesisStore(None) as store:
        dev = TunedSet(alone, tuple(recordings), encoded, store, normaliser("basic"), Counted())
        with pytest.raises(InvalidArgumentError, match="none is loaded"):
            tune(dev, BASE, SETTINGS)
    (tmp_path / "broken.jsonl").write_text('{"audio": "nowhere.wav", "text": "x"}\n')
    with pytest.raises(ShallowFusionError, match=r"nowhere\.wav does not exist"):
        encoded.make(read_manifest(tmp_path / "broken.jsonl"), Counted(), 8)
