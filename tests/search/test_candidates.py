"""Sources that score only what survives: against a search that sees them at every token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from shallowfusion.config import BeamSettings
from shallowfusion.fusion import static
from shallowfusion.scorers.base import Context
from shallowfusion.search.candidates import CandidateArrays, with_candidate_scores
from shallowfusion.search.loop import SearchPlan, StageClock, search
from shallowfusion.values import Unmapped
from tests.tiny import END, NO_TIMESTAMPS, START, random_encoder_output, tiny_whisper


class BigramTable:
    """A source that knows only the last token of each row."""

    name = "bigram"

    def __init__(self, table: np.ndarray, weight: float, num_utterances: int) -> None:
        self.table, self.weight = table, weight
        self.last = np.zeros((num_utterances, 1), dtype=np.int64)

    def increments(self, lanes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.table[np.take_along_axis(self.last, np.maximum(lanes, 0), axis=1), tokens]

    def follow(self, parents: np.ndarray, tokens: np.ndarray) -> None:
        self.last = tokens.copy()

    def keep(self, order: Sequence[int]) -> None:
        self.last = self.last[list(order)]


def decode(weight: float | None, beam_size: int = 4, utterances: int = 5, seed: int = 0) -> list:
    acoustic = tiny_whisper(seed)
    table = np.log(np.random.default_rng(seed).dirichlet(np.ones(44), size=44))
    plan = SearchPlan(
        BeamSettings(beam_size=beam_size, end_ids=(END,), max_new_tokens=12),
        static(()),
        (None,),
        (Unmapped("neutral"),),
        suppressed=(START, NO_TIMESTAMPS, 43),
    )
    context = Context([[START, NO_TIMESTAMPS]] * utterances, beam_size, 12, random_encoder_output(acoustic, utterances))
    late = [] if weight is None else [BigramTable(table, weight, utterances)]
    outcomes = search([acoustic.scorer], [context], ["asr"], plan, StageClock(), late)
    return [(outcome.hypotheses, table) for outcome in outcomes]


def test_weight_zero_changes_no_bit_and_reports_the_part() -> None:
    for (with_source, table), (without, _) in zip(decode(0.0), decode(None), strict=True):
        assert [(h.token_ids, h.total) for h in with_source] == [(h.token_ids, h.total) for h in without]
        for hypothesis in with_source:
            path = [0, *hypothesis.token_ids, *([END] if hypothesis.ended else [])]
            wanted = [table[a, b] for a, b in itertools.pairwise(path)]
            np.testing.assert_allclose(hypothesis.parts[:, 1], wanted, rtol=1e-5)


def test_totals_hold_the_weighted_part() -> None:
    for hypotheses, _ in decode(0.7):
        for hypothesis in hypotheses:
            wanted = hypothesis.parts[:, 0].sum() + 0.7 * hypothesis.parts[:, 1].sum()
            assert hypothesis.total == pytest.approx(wanted, abs=1e-4)


def test_utterances_that_leave_take_their_state_with_them() -> None:
    together = decode(0.7, seed=3)
    lengths = {len(hypotheses[0].token_ids) for hypotheses, _ in together}
    assert len(lengths) > 1  # they do leave at different steps
    alone = decode(0.7, utterances=1, seed=3)
    assert [h.token_ids for h in alone[0][0]] == [h.token_ids for h in together[0][0]]


def test_candidates_are_ranked_anew_and_impossible_ones_leave() -> None:
    class Fixed:
        name, weight = "fixed", 2.0

        def increments(self, lanes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            return np.array([[-3.0, -np.inf, -0.5, -7.0]])

    found = CandidateArrays(
        totals=np.array([[-1.0, -1.5, -2.0, -np.inf]], dtype=np.float32),
        lanes=np.array([[0, 1, 0, -1]]),
        tokens=np.array([[5, 6, 7, -1]]),
        parts=np.array([[[-1.0], [-1.5], [-2.0], [0.0]]], dtype=np.float32),
        flagged=np.array([False]),
    )
    ranked = with_candidate_scores(found, [Fixed()], 3)  # type: ignore[list-item]
    assert ranked.tokens.tolist() == [[7, 5, -1]]
    assert ranked.lanes.tolist() == [[0, 0, -1]]
    assert ranked.totals[0, :2].tolist() == [-3.0, -7.0]
    assert ranked.totals[0, 2] == -np.inf
    torch.testing.assert_close(torch.tensor(ranked.parts[0, :2]), torch.tensor([[-2.0, -0.5], [-1.0, -3.0]]))
