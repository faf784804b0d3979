"""The procedure of tune on tiny models: everything is decoded once, the choice is the best, a killed run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
        ({"trust": 1.0}, "trust must be"),
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


def test_coverage_reaches_the_decoder_with_the_length_of_each_recording(tmp_path: Path) -> None:
    recordings = read_manifest(manifest(tmp_path / "dev.jsonl", 1, 5))
    encoded = EncodedSet(decoder(), tmp_path / "encoded")
    encoded.make(recordings, Counted(), 8)
    options = DecodingOptions(
        beam_size=3, n_best=3, rule=parse_rule("static(0.8)"), coverage_weight=0.5, min_attention_centre=0.3
    )
    with HypothesisStore(None) as store:
        dev = TunedSet(decoder(), tuple(recordings), encoded, store, normaliser("basic"), Counted())
        lists = dev.decode(options, "")
    assert encoded.seconds(recordings) == [
        pytest.approx(result.duration) for result in decoder().transcribe([r.audio for r in recordings], options)
    ]
    plain = decoder().transcribe([r.audio for r in recordings], options)
    assert dev.texts(lists) == [result.text for result in plain]


def test_the_choice_is_guarded_by_the_floor_of_its_own_transcripts(tmp_path: Path) -> None:
    recordings = read_manifest(manifest(tmp_path / "dev.jsonl", 1, 5, 9))
    encoded = EncodedSet(decoder(), tmp_path / "encoded")
    encoded.make(recordings, Counted(), 8)
    settings = TuningSettings(grid=(0.3, 0.8), num_trials=0, with_internal_lm=False, trust=0.5)
    with HypothesisStore(None) as store:
        dev = TunedSet(decoder(), tuple(recordings), encoded, store, normaliser("basic"), Counted())
        found = tune(dev, BASE, settings)
        untrusted = min((own for own in found.tried if own.origin != "trusted"), key=lambda own: own.num_errors)
        lists = dev.decode(untrusted.options, untrusted.rule)
    assert found.chosen.origin == "trusted"
    trust = found.chosen.options.rule.trust
    means = sorted(own.first.parts["lm"] / own.first.num_tokens for own in lists.values())
    assert trust.floor == pytest.approx(means[1], rel=1e-3)  # the middle one
    pairs = zip(found.chosen.texts, untrusted.texts, found.baseline.texts, strict=True)
    assert all(own in (fused, alone) for own, fused, alone in pairs)
    assert sum(own == fused for own, fused in zip(found.chosen.texts, untrusted.texts, strict=True)) >= 1


def test_a_trained_context_is_drawn_where_one_is_loaded_and_tells_lists_apart(tmp_path: Path) -> None:
    assert "variant='silence'" in drawn_rule("internal_lm", Middle(), 1)
    assert "variant='trained'" in drawn_rule("internal_lm", Middle(), 1, True)
    size = decoder().acoustic.scorer.model.config.d_model
    options = DecodingOptions(rule=parse_rule("internal_lm(0.8, 0.2, 'trained')"))
    systems = set()
    for value in (0.0, 1.0):
        own = FusionDecoder(decoder().acoustic, decoder().language_models, torch.full((1, size), value))
        encoded = EncodedSet(own, tmp_path / "encoded")
        with HypothesisStore(None) as store:
            systems.add(TunedSet(own, (), encoded, store, normaliser("basic"), Counted())._system(options, True))
    assert len(systems) == 2
