"""CTC models in sessions: they hear what the encoder hears, and what comes back is what comes back one by one."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.ctc.joint import CtcFrames
from shallowfusion.ctc.label_spelling import LetterSpelling, PieceSpelling, TokenSpelling
from shallowfusion.ctc.models import CtcModel
from shallowfusion.errors import CapacityError, InvalidArgumentError
from shallowfusion.features.log_mel import log_mel
from shallowfusion.scorers.footprint import bytes_together
from shallowfusion.search.loop import StageClock
from shallowfusion.search.running import RunningSearches
from shallowfusion.text.vocabulary import Vocabulary
from tests import tiny
from tests.ctc.joint import tiny_head
from tests.ctc.tiny_models import PIECES, save_tiny_model
from tests.session.conftest import BASE, alone_on, assert_nothing_is_left, assert_same
from tests.shipped import ASR, clip

FRAME, RATE = 400, 9600  # samples; those of the fixture `hearing`
TEXTS: dict[str, tuple[bytes, ...]] = {
    "letters": (b" a", b"ab", b" B", b"a.", b" \xc3", b"\xa9b"),
    "pieces": (b" Th", b"e", b" cat", b"s", b" a,"),
}
SPELLINGS = {"letters": LetterSpelling, "pieces": PieceSpelling, "tokens": TokenSpelling, "head": type(None)}
KINDS = tuple(SPELLINGS)
BROKEN, DEAF = 7.0, 9.0  # a first sample of that loudness makes the CTC model say NaN, or fail


class SoundModel(CtcModel):
    """Labels as a random matrix hears them in frames of 400 samples; a recording alone and in a batch is the same."""

    sizes: list[int]

    def log_probs(self, samples: Sequence[torch.Tensor]) -> Any:
        self.sizes.append(len(samples))
        found = [self.one(own) for own in samples]
        lengths = np.array([len(own) for own in found])
        padded = torch.zeros((len(found), int(lengths.max()), len(self.labels)))
        for place, own in enumerate(found):
            padded[place, : len(own)] = own
        return padded, lengths

    def one(self, samples: torch.Tensor) -> torch.Tensor:
        if samples[0] == DEAF:
            raise RuntimeError("deaf to this one")
        draw = torch.Generator().manual_seed(len(self.labels))
        matrix = 1.5 * torch.randn((FRAME, len(self.labels)), generator=draw)
        logits = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME) @ matrix
        logits[:, self.blank] += 2.0
        log_probs = torch.log_softmax(logits, dim=1)
        return torch.full_like(log_probs, torch.nan) if samples[0] == BROKEN else log_probs


def sound_model(labels: tuple[str, ...], blank: int, **changes: Any) -> SoundModel:
    made = SoundModel("sounds", None, None, labels, blank, None, None, (), RATE, FRAME / RATE, None)
    made = dataclasses.replace(made, **changes)
    object.__setattr__(made, "sizes", [])
    return made


def model_of(kind: str, directory: Path) -> SoundModel | None:
    if kind == "letters":
        return sound_model(("", "|", "A", "B", "E"), 0, delimiter=1)
    if kind == "pieces":
        save_tiny_model("parakeet_ctc", directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        return sound_model((*PIECES, "<b>"), len(PIECES), word_start="\u2581", silenced=(0,), tokenizer=tokenizer)
    if kind == "tokens":
        return sound_model(("", *(f"{token:02d}" for token in range(tiny.TEXT_TOKENS))), 0)
    return None


def joined(hearing: FusionDecoder, kind: str, directory: Path) -> FusionDecoder:
    """The decoder that hears sounds, with a CTC model or a head beside it, and a language model."""
    acoustic, lm = hearing.acoustic, tiny.tiny_lm(2)
    if kind in TEXTS:
        tokens = (*TEXTS[kind], *[None] * (tiny.ACOUSTIC_VOCAB - len(TEXTS[kind])))
        acoustic.scorer.vocabulary = lm.vocabulary = Vocabulary(tokens, tiny.END, None, kind)
    if kind == "head":
        acoustic = dataclasses.replace(acoustic, ctc_head=tiny_head(3))
    decoder = FusionDecoder(acoustic, [lm], ctc=model_of(kind, directory))
    assert isinstance(None if decoder.ctc is None else decoder.ctc.spelling, SPELLINGS[kind])
    return decoder


def weighted(weight: float, **more: Any) -> dict[str, Any]:
    return {**BASE, "beam_size": 3, "lm_weight": 0.3, "ctc_weight": weight, **more}


@pytest.fixture
def letters(hearing: FusionDecoder, tmp_path: Path) -> FusionDecoder:
    return joined(hearing, "letters", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_random_arrivals_weights_and_cancellations_change_no_result_and_leak_nothing(
    kind: str, hearing: FusionDecoder, sounds, tmp_path: Path
) -> None:
    decoder = joined(hearing, kind, tmp_path)
    known: dict[tuple[int, str], Any] = {}

    def wanted(place: int, options: dict[str, Any]) -> Any:
        key = place, repr(options)
        if key not in known:
            known[key] = alone_on(decoder, sounds[place], **options)
        return known[key]

    request = st.fixed_dictionaries(
        {
            "ctc_weight": st.sampled_from([0.0, 0.3, 0.6]),
            "beam_size": st.integers(1, 5),
            "max_new_tokens": st.integers(1, 14),
            "lm_weight": st.sampled_from([0.0, 0.3]),
            "stop_rule": st.sampled_from(["hf", "whisper", "espnet"]),
            "end_policy": st.sampled_from(["neutral", "asr_only"]),
        }
    )

    @settings(max_examples=10)
    @given(
        asked=st.lists(st.tuples(request, st.integers(0, 11)), min_size=1, max_size=9),
        seed=st.integers(0, 999),
        most=st.integers(1, 5),
        encoder_batch=st.integers(1, 4),
        overlap=st.booleans(),
    )
    def check(asked: list[Any], seed: int, most: int, encoder_batch: int, overlap: bool) -> None:
        draw, futures = random.Random(seed), []
        with decoder.session(max_utterances=most, encoder_batch=encoder_batch, overlap_encoder=overlap) as session:
            for options, place in asked:
                future = session.submit(sounds[place], **{**BASE, **options})
                futures.append(future)
                if draw.random() < 0.25:
                    threading.Timer(draw.choice([0.0, 0.002, 0.01]), future.cancel).start()
                time.sleep(draw.choice([0.0, 0.0, 0.003]))
        assert_nothing_is_left(session)
        told = session.statistics()
        assert told.finished + told.cancelled == len(asked)
        assert told.encoded_bytes == 0
        for (options, place), future in zip(asked, futures, strict=True):
            if not future.cancelled():
                assert_same(future.result(), wanted(place, {**BASE, **options}))
                assert ("ctc" in future.result().best.parts) == (options["ctc_weight"] > 0)

    check()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_recording_that_the_model_cannot_hear_fails_or_is_flagged_alone(letters, sounds, overlap: bool) -> None:
    deaf, broken = sounds[1].clone(), sounds[2].clone()
    deaf[0], broken[0] = DEAF, BROKEN
    order = [sounds[0], deaf, broken, sounds[3], sounds[4]]
    with letters.session(encoder_batch=5, admission_seconds=2.0, overlap_encoder=overlap) as session:
        futures = [session.submit(own, **weighted(0.4)) for own in order]
    with pytest.raises(RuntimeError, match="deaf to this one"):
        futures[1].result()
    assert "nan" in futures[2].result().flags
    for place in (0, 3, 4):
        assert_same(futures[place].result(), alone_on(letters, order[place], **weighted(0.4)))
    assert letters.ctc.model.sizes[:6] == [5, 1, 1, 1, 1, 1]
    assert session.statistics().failed == 1
    assert_nothing_is_left(session)


@pytest.mark.parametrize("overlap", [True, False])
def test_only_those_that_ask_are_heard_and_pay(letters, sounds, overlap: bool) -> None:
    with letters.session(encoder_batch=4, admission_seconds=2.0, overlap_encoder=overlap) as session:
        futures = [session.submit(own, **weighted(0.4 * (i % 2))) for i, own in enumerate(sounds[:4])]
    assert letters.ctc.model.sizes == [2]
    stages = [future.result().timing.stages for future in futures]
    assert ["ctc" in own for own in stages] == [False, True, False, True]
    assert sum(own.get("ctc", 0.0) for own in stages) == pytest.approx(session.statistics().seconds["ctc"])


def test_short_memory_in_the_ctc_model_fails_that_recording_alone(letters, sounds, monkeypatch) -> None:
    hear, calls = letters.ctc.frames, []

    def scarce(samples: Any) -> CtcFrames:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("none at all")
        return hear(samples)

    monkeypatch.setattr(letters.ctc, "frames", scarce)
    with letters.session(max_utterances=1, encoder_batch=1) as session:
        first, second = (session.submit(own, **weighted(0.4)) for own in sounds[:2])
    monkeypatch.undo()
    with pytest.raises(MemoryError):
        first.result()
    assert_same(second.result(), alone_on(letters, sounds[1], **weighted(0.4)))


def test_features_and_encoder_output_bring_what_the_model_heard_or_are_refused(letters, sounds) -> None:
    features = log_mel(sounds[:2], letters.acoustic.features)
    encoded = letters.acoustic.scorer.encode(features)
    frames = letters.ctc.frames(sounds[:2])
    with letters.session() as session:
        for item in (features[0], encoded[0]):
            with pytest.raises(InvalidArgumentError, match=r"hears recordings, and got features.*ctc_frames="):
                session.submit(item, **weighted(0.4))
        for wrong in (frames, CtcFrames(frames.log_probs[:1, :, :3])):
            with pytest.raises(InvalidArgumentError, match="of 1 utterances and the 5 labels"):
                session.submit(encoded[0], ctc_frames=wrong, **weighted(0.4))
        silent = session.submit(encoded[0], **weighted(0.0))
        heard = [session.submit(features[i], ctc_frames=frames.at([i]), **weighted(0.4)) for i in range(2)]
        given_too = session.submit(sounds[0], ctc_frames=frames.at([0]), **weighted(0.4))
    assert len(letters.ctc.model.sizes) == 1  # ours, above
    assert "ctc" not in silent.result().best.parts
    for future, own in zip([*heard, given_too], [0, 1, 0], strict=True):
        wanted = letters.decode(encoded[own : own + 1], ctc_frames=frames.at([own]), **weighted(0.4))[0]
        assert_same(future.result(), wanted)


def test_what_no_search_could_do_is_refused_when_submitted(letters, one_lm, recordings) -> None:
    with letters.session() as session, pytest.raises(InvalidArgumentError, match="ctc_weight goes with rules"):
        session.submit(torch.zeros(4000), ctc_weight=0.3, rule=fusion.entropy_gate(0.3), **BASE)
    with one_lm.session() as session, pytest.raises(InvalidArgumentError, match="needs a CTC head"):
        session.submit(recordings[0], ctc_weight=0.3, **BASE)


def test_a_rule_that_gives_language_models_up_keeps_the_ctc_model(letters, sounds) -> None:
    rule = fusion.trusted(fusion.static(0.3), floor=-1e-6)
    own = DecodingOptions.of(**{**BASE, "beam_size": 3, "rule": rule, "ctc_weight": 0.3})
    wanted = [letters.transcribe([sound], own)[0] for sound in sounds[:4]]
    with letters.session(max_utterances=2) as session:
        futures = [session.submit(sound, own) for sound in sounds[:4]]
    for future, result in zip(futures, wanted, strict=True):
        assert_same(future.result(), result)
        assert "lm_distrusted" in future.result().flags
    assert session.statistics().given_up == 4


@pytest.mark.parametrize("kind", KINDS)
def test_scores_take_no_more_memory_than_was_reckoned(kind: str, hearing, tmp_path: Path, monkeypatch) -> None:
    from shallowfusion.ctc import prefix_scores

    most: dict[int, int] = {}

    def spied(self: Any, parents: object, labels: object) -> None:
        follow(self, parents, labels)
        most[id(self)] = max(most.get(id(self), 0), self.num_bytes)

    follow = prefix_scores.PrefixScores.follow
    monkeypatch.setattr(prefix_scores.PrefixScores, "follow", spied)
    decoder = joined(hearing, kind, tmp_path)
    draw = torch.Generator().manual_seed(0)
    sound = 0.1 * torch.randn(RATE, generator=draw)  # as long as may be
    for width in (1, 5):
        options = DecodingOptions.of(**weighted(0.3, beam_size=width))
        demands = decoder._planner.demands(options)
        plain = decoder._planner.demands(DecodingOptions.of(**weighted(0.0, beam_size=width)))
        counted = bytes_together([demands]) - bytes_together([plain])
        most.clear()
        decoder.transcribe([sound], options)
        assert 0 < max(most.values()) <= counted


def test_requests_that_ask_a_ctc_model_count_in_the_budget(letters, sounds) -> None:
    planner = letters._planner
    plain = bytes_together([planner.demands(DecodingOptions.of(**weighted(0.0)))])
    heard = bytes_together([planner.demands(DecodingOptions.of(**weighted(0.4)))])
    with letters.session(memory_budget=(plain + heard) // 2) as session:
        fits = session.submit(sounds[0], **weighted(0.0))
        with pytest.raises(CapacityError, match="CTC scores"):
            session.submit(sounds[0], **weighted(0.4))
    assert fits.result().n_best


def test_frames_leave_with_the_utterance_and_count_while_they_wait(letters, sounds) -> None:
    scorer, opened = letters.acoustic.scorer, threading.Event()
    scorer.on_start = lambda number: opened.wait(60) and None
    config = scorer.model.config
    with letters.session(max_utterances=1, encoder_batch=2, overlap_encoder=True) as session:
        futures = [session.submit(own, **weighted(0.4)) for own in sounds[:6]]
        end = time.monotonic() + 60
        while session.statistics().encoded < 3 and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)
        told = session.statistics()
        assert told.encoded_bytes > told.encoded * config.max_source_positions * config.d_model * 4
        jobs = [*session._worker.line, *session._worker._busy]
        opened.set()
    assert all(future.result().n_best for future in futures)
    assert [job.frames for job in jobs] == [None] * len(jobs)


def test_cohorts_of_frames_of_any_length_are_those_of_one_by_one(letters, sounds) -> None:
    """Utterances enter while others run, and leave in another order than they came."""
    planner, clock = letters._planner, StageClock()
    running, cohorts = RunningSearches(clock), []
    for number, places in enumerate([(11, 0), (5,), (3, 7, 1)]):
        options = DecodingOptions.of(**weighted(0.5, max_new_tokens=3 + 4 * number))
        encoded = letters.encode([sounds[place] for place in places])
        frames = CtcFrames.together([letters.ctc.frames([sounds[place]]).each()[0] for place in places])
        seconds = [len(sounds[place]) / RATE for place in places]
        own = planner.sources(encoded, options, clock, seconds, frames)
        cohorts.append((places, options, running.admit(own.scorers, own.contexts, own.names, own.plan, own.late)))
        running.step()
    while running.num_running:
        running.step()
    for places, options, cohort in cohorts:
        for place, sound in enumerate(places):
            wanted = letters.transcribe([sounds[sound]], options)[0]
            found = max(cohort.beams.results(place, 3), key=lambda hypothesis: hypothesis.key)
            assert list(found.token_ids) == list(wanted.best.token_ids)
            assert found.total == pytest.approx(wanted.best.total, abs=1e-4)


@pytest.mark.parametrize("kind", ["wav2vec2", "parakeet_ctc"])
def test_models_of_transformers_are_heard_in_sessions(kind: str, tmp_path: Path) -> None:
    save_tiny_model(kind, tmp_path)
    decoder = FusionDecoder.from_pretrained(ASR, device="cpu", ctc=str(tmp_path))
    options: dict[str, Any] = {"beam_size": 2, "ctc_weight": 0.02, "max_new_tokens": 8}
    with decoder.session(max_utterances=3, encoder_batch=1) as session:
        futures = [session.submit(clip(place), **options) for place in (2, 5)]
    for place, future in zip((2, 5), futures, strict=True):
        assert_same(future.result(), decoder.transcribe([clip(place)], **options)[0])
        assert future.result().timing.stages["ctc"] > 0


@pytest.mark.gpu
def test_a_ctc_model_on_a_gpu_is_heard_beside_the_encoder(tmp_path: Path) -> None:
    save_tiny_model("wav2vec2", tmp_path)
    decoder = FusionDecoder.from_pretrained(ASR, device="cuda", dtype="float32", ctc=str(tmp_path))
    options: dict[str, Any] = {"beam_size": 2, "ctc_weight": 0.02, "max_new_tokens": 8}
    clips = [clip(place) for place in range(8)]
    wanted = [decoder.transcribe([own], **options)[0] for own in clips]
    for overlap in (True, False):
        with decoder.session(max_utterances=3, encoder_batch=2, overlap_encoder=overlap) as session:
            futures = [session.submit(own, **options) for own in clips]
        assert [own.result().best.token_ids for own in futures] == [own.best.token_ids for own in wanted]
