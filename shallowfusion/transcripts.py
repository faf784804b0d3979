"""From the end of a search to hypotheses with texts, parts and flags, best first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shallowfusion.fusion.coverage import attention_centre, coverage
from shallowfusion.options import DecodingOptions
from shallowfusion.results import compression_ratio
from shallowfusion.scorers.cross_attention import attention_over_frames
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.search.beam_state import FinishedHypothesis
from shallowfusion.search.loop import SearchOutcome
from shallowfusion.search.timestamp_spans import spans_of
from shallowfusion.search.timestamps import TimestampRules
from shallowfusion.values import Hypothesis, Token

__all__ = ["hypotheses_of", "ranked_by_listening"]

LOOP_COMPRESSION_RATIO = 2.4  # openai-whisper's threshold
TRUNCATION_LOG_PROB = math.log(0.1)


def hypotheses_of(
    outcome: SearchOutcome, names: Sequence[str], acoustic: AcousticModel, timestamps: TimestampRules | None = None
) -> list[Hypothesis]:
    """The hypotheses of one utterance, best first; `names` are those of the parts, `timestamps` of the plan."""
    return [_hypothesis(found, names, acoustic, outcome.saw_nan, timestamps) for found in outcome.hypotheses]


def ranked_by_listening(
    hypotheses: Sequence[Hypothesis],
    acoustic: AcousticModel,
    encoder_output: Tensor,
    prefix: Sequence[int],
    sound: float,
    options: DecodingOptions,
) -> list[Hypothesis]:
    """Rank anew by score + coverage_weight * coverage, those that ended too early in the recording last.

    A hypothesis whose last step looks at less than `min_attention_centre` of the recording gets the flag "truncation".
    Does nothing unless one of the two options is set. Price: one decoder pass over all hypotheses.

    Args:
        encoder_output: [frames, size] of the utterance.
        sound: share of the frames that hold the recording; the rest is padding.
    """
    if not hypotheses or (options.coverage_weight == 0 and options.min_attention_centre is None):
        return list(hypotheses)
    looks = attention_over_frames(acoustic.scorer, encoder_output, prefix, [h.token_ids for h in hypotheses])
    frames = max(1, round(sound * len(encoder_output)))
    ranked = []
    for hypothesis, look in zip(hypotheses, looks, strict=True):
        heard = look[:, :frames]
        score = hypothesis.score + options.coverage_weight * coverage(heard, options.coverage)
        lowest = options.min_attention_centre
        is_early = lowest is not None and hypothesis.ended and attention_centre(heard) < lowest
        flags = hypothesis.flags
        if is_early and "truncation" not in flags:
            flags = (*flags, "truncation")
        ranked.append((is_early, dataclasses.replace(hypothesis, score=score, flags=flags)))
    ranked.sort(key=lambda pair: (pair[0], -pair[1].score))
    return [hypothesis for _, hypothesis in ranked]


def _hypothesis(
    found: FinishedHypothesis,
    names: Sequence[str],
    acoustic: AcousticModel,
    saw_nan: bool,
    timestamps: TimestampRules | None,
) -> Hypothesis:
    tokenizer: Any = acoustic.tokenizer
    ids = list(found.token_ids)

    def text_of(own: Sequence[int]) -> str:
        said = [i for i in own if timestamps is None or not timestamps.is_timestamp(i)]
        text: str = tokenizer.decode(said, skip_special_tokens=True)
        return text

    text = text_of(ids).strip()
    texts = [text_of([i]) for i in ids]
    if found.ended:
        ids, texts = [*ids, acoustic.tokens.end], [*texts, ""]
    parts = found.parts.astype(float)
    tokens = tuple(
        Token(i, t, float(total), dict(zip(names, row.tolist(), strict=True)))
        for i, t, total, row in zip(ids, texts, found.token_totals, parts, strict=True)
    )
    sums = dict(zip(names, parts.sum(axis=0).tolist(), strict=True))
    flags = {
        "forced_finish": not found.ended,
        "truncation": found.ended and parts[-1, 0] < TRUNCATION_LOG_PROB,
        "repetition": compression_ratio(text) > LOOP_COMPRESSION_RATIO,
        "nan": saw_nan,
    }
    raised = tuple(name for name, is_raised in flags.items() if is_raised)
    spans = None if timestamps is None else spans_of(timestamps, found.token_ids, text_of)
    return Hypothesis(text, tuple(found.token_ids), tokens, found.total, found.key, sums, raised, spans)
