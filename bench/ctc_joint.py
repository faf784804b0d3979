"""CTC scores of candidates of byte pairs that are spelled in letters, inside a label-synchronous search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from bench.ctc_prefix import BEAM, CANDIDATES
from bench.timing import Measurement, measurements, take_turns
from shallowfusion.ctc.label_spelling import LetterSpelling, TokenSpelling
from shallowfusion.ctc.prefix_scores import PrefixScores
from shallowfusion.ctc.prefix_scores_reference import ReferencePrefixScores
from shallowfusion.ctc.settings import CtcAlphabet
from shallowfusion.ctc.spelled_scorer import SpelledPrefixScorer
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["run"]

SHAPES = ((1, 500), (8, 500), (8, 1500))  # utterances, frames of 20 ms
STEPS = 24
LABELS = ("", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
NUM_TOKENS = 5000
END = NUM_TOKENS


def vocabulary(generator: np.random.Generator) -> Vocabulary:
    """Pieces of 1 to 9 letters, 4.5 on average, two thirds with a space in front."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = np.minimum(generator.poisson(3.5, size=NUM_TOKENS) + 1, 9)
    words = ["".join(generator.choice(letters, size=length)) for length in lengths]
    spaced = [(" " if generator.random() < 2 / 3 else "") + word for word in words]
    return Vocabulary((*(word.encode() for word in spaced), None), END, None, "pieces")


def searched(scorer: SpelledPrefixScorer, picks: np.ndarray) -> np.ndarray:
    """Goes on with the best candidates; all scores that were given."""
    given = []
    rows = np.zeros(picks.shape[1:], dtype=np.int64)
    for tokens in picks:
        found = scorer.increments(rows, tokens)
        given.append(found)
        best = np.argsort(-found, axis=1, kind="stable")[:, :BEAM]
        scorer.follow(np.take_along_axis(rows, best, 1), np.take_along_axis(tokens, best, 1))
        rows = np.tile(np.arange(BEAM), (len(rows), CANDIDATES // BEAM))
    return np.array(given)


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Milliseconds of a whole search of 24 steps; scores agree before anything is timed."""
    torch.set_num_threads(1)
    for utterances, frames in SHAPES[:1] if quick else SHAPES:
        generator = np.random.default_rng(0)
        tokens = vocabulary(generator)
        logits = generator.normal(size=(utterances, frames, len(LABELS))) * 2.0
        logits[:, :, 0] += 4.0 + np.log(len(LABELS))
        log_probs = torch.log_softmax(torch.from_numpy(logits), dim=-1).float()
        picks = generator.integers(NUM_TOKENS, size=(STEPS, utterances, CANDIDATES))
        single = generator.integers(2, len(LABELS), size=picks.shape)
        spelling = LetterSpelling(tokens, CtcAlphabet(LABELS, 0, 1))
        alone = TokenSpelling(range(len(LABELS)))
        fine = np.zeros(utterances, dtype=bool)

        def spelled(make: Callable[..., Any], **options: Any) -> np.ndarray:
            scores = make(log_probs, delimiter=1, **options)  # noqa: B023 - called in this turn of the loop
            return searched(SpelledPrefixScorer(scores, spelling, END, 1.0, fine), picks)  # noqa: B023

        def one_label() -> np.ndarray:
            scores = PrefixScores(log_probs, threads=1)  # noqa: B023
            return searched(SpelledPrefixScorer(scores, alone, END, 1.0, fine), single)  # noqa: B023

        providers: dict[str, Callable[[], np.ndarray]] = {
            "ours": lambda: spelled(PrefixScores, threads=1),
            "ours, margin 300": lambda: spelled(PrefixScores, threads=1, margin=300.0),
            "ours, every token one label": one_label,
        }
        if utterances == 1:
            providers["python twin"] = lambda: spelled(ReferencePrefixScores)
        wanted = providers["ours"]()
        for name in providers.keys() & {"python twin", "ours, margin 300"}:
            np.testing.assert_allclose(providers[name](), wanted, rtol=1e-6, atol=1e-5, err_msg=name)
        seconds = take_turns(providers, 3 if quick else 9)
        shape = f"{utterances} utterances, {frames} frames, {len(LABELS)} labels, beam {BEAM}, {STEPS} steps"
        yield measurements("ctc_joint", shape, "float32", seconds, "ours")
