"""The session's engine when something fails: short memory waits or ends one job, a broken step ends those that ran."""

from __future__ import annotations

import pytest
import torch

from tests.session.conftest import BASE, alone, assert_nothing_is_left, assert_same


def test_short_memory_makes_a_request_wait_for_others_to_leave(one_lm, recordings, monkeypatch) -> None:
    scorer, tries = one_lm.acoustic.scorer, []
    start = scorer.start

    def scarce(context):
        tries.append(len(context.prompts))
        if len(tries) in (3, 4):
            raise torch.OutOfMemoryError("no memory for another")
        return start(context)

    monkeypatch.setattr(scorer, "start", scarce)
    with one_lm.session(max_utterances=4, encoder_batch=1) as session:
        futures = [session.submit(own, min_new_tokens=8, **BASE) for own in recordings[:5]]
    for own, future in zip(recordings[:5], futures, strict=True):
        assert_same(future.result(), alone(one_lm, own, min_new_tokens=8, **BASE))
    assert session.statistics().failed == 0
    assert len(tries) > 5
    assert_nothing_is_left(session)


def test_short_memory_with_nothing_running_fails_that_request_alone(one_lm, recordings, monkeypatch) -> None:
    scorer = one_lm.acoustic.scorer
    start, wanted = scorer.start, alone(one_lm, recordings[1], **BASE)
    calls: list[int] = []

    def scarce(context):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("none at all")
        return start(context)

    monkeypatch.setattr(scorer, "start", scarce)
    with one_lm.session(max_utterances=1) as session:
        first, second = (session.submit(own, **BASE) for own in recordings[:2])
    with pytest.raises(MemoryError):
        first.result()
    assert_same(second.result(), wanted)


def test_a_group_that_cannot_start_together_is_tried_one_by_one(one_lm, recordings, monkeypatch) -> None:
    scorer, sizes = one_lm.acoustic.scorer, []
    start = scorer.start

    def only_one(context):
        sizes.append(len(context.prompts))
        if len(context.prompts) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return start(context)

    monkeypatch.setattr(scorer, "start", only_one)
    with one_lm.session(max_utterances=4, admission_seconds=2.0, encoder_batch=3) as session:
        futures = [session.submit(own, beam_size=2, **BASE) for own in recordings[:3]]
    monkeypatch.undo()
    assert sizes[0] == 3  # equal plain options are one record, so they start together
    assert 1 in sizes
    for own, future in zip(recordings[:3], futures, strict=True):
        assert_same(future.result(), alone(one_lm, own, beam_size=2, **BASE))


def test_a_step_that_breaks_ends_those_that_ran_and_the_session_goes_on(one_lm, recordings, monkeypatch) -> None:
    lm = one_lm.language_models[0]
    score, calls = lm.score, []

    def breaks_once(state, token_ids):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        return score(state, token_ids)

    monkeypatch.setattr(lm, "score", breaks_once)
    with one_lm.session(max_utterances=1) as session:
        first, second = (session.submit(own, min_new_tokens=5, **BASE) for own in recordings[:2])
        with pytest.raises(RuntimeError, match="device is gone"):
            first.result(timeout=60)
        assert_same(second.result(timeout=60), alone(one_lm, recordings[1], min_new_tokens=5, **BASE))
    assert session.statistics().failed == 1
    assert_nothing_is_left(session)


def test_whoever_has_an_answer_finds_it_counted(one_lm, recordings) -> None:
    counted: list[tuple[int, int]] = []

    def count(future) -> None:
        told = session.statistics()
        counted.append((told.finished, told.failed))

    with one_lm.session(max_utterances=1) as session:
        for item in (recordings[0], "nowhere.wav", recordings[1]):
            session.submit(item, **BASE).add_done_callback(count)
    assert sorted(counted) == [(1, 0), (1, 1), (2, 1)]


def test_recordings_that_cannot_be_encoded_together_are_encoded_alone(one_lm, monkeypatch) -> None:
    scorer, settings = one_lm.acoustic.scorer, one_lm.acoustic.features
    config = scorer.model.config
    size = (config.max_source_positions, config.d_model)
    heard: list[int] = []

    def encode(features):
        heard.append(len(features))
        if len(features) > 1:
            raise torch.OutOfMemoryError("too many")
        if features.isnan().any():
            raise RuntimeError("a broken recording")
        return torch.zeros((1, *size))

    monkeypatch.setattr(scorer, "encode", encode)
    features = torch.zeros((3, settings.feature_size, settings.chunk_frames))
    features[1] = float("nan")
    with one_lm.session(admission_seconds=2.0, encoder_batch=3) as session:
        futures = [session.submit(own, **BASE) for own in features]
    assert heard == [3, 1, 1, 1]
    assert futures[0].result().n_best
    assert futures[2].result().n_best
    with pytest.raises(RuntimeError, match="broken"):
        futures[1].result()
