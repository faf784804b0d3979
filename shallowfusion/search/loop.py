"""The search: where scorers, which know models, and the fused step, which knows numbers, meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shallowfusion.config import BeamSettings
from shallowfusion.fusion.rules import Rule
from shallowfusion.fusion.step import Backend
from shallowfusion.fusion.token_classes import ClassSource
from shallowfusion.phrases.automaton import PhraseAutomatonProtocol
from shallowfusion.scorers.base import Context, Scorer
from shallowfusion.search.beam_state import FinishedHypothesis
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.running import RunningSearches
from shallowfusion.search.stage_clock import StageClock
from shallowfusion.search.timestamps import TimestampRules
from shallowfusion.values import Normalize, Unmapped

__all__ = ["SearchOutcome", "SearchPlan", "StageClock", "search"]


@dataclass(frozen=True)
class SearchPlan:
    """Everything about one batch of searches that is not a model.

    Args:
        settings: width, stop rule and ranking.
        rule: weights of the language models by step.
        maps: per source the id of each acoustic token (see `fused_step`); maps[0] is None.
        unmapped: per source what it says of tokens without counterpart.
        normalize: of the fused row.
        suppressed: acoustic ids never to be generated; `first_suppressed`: not as the first token.
        min_new_tokens: the end token is forbidden before this many tokens.
        end_threshold: where the rule fuses, the end token is a candidate only if its acoustic log-prob exceeds
            end_threshold times that of the best token (1904.02619, section 3.1.2); None = always.
        acoustic_weight: of the first source; the rest of 1 is that of a late source such as CTC.
        fuses_late: end_threshold holds even where the rule, which knows nothing of late sources, does not fuse.
        class_sources: second looks at sources for tokens whose weight differs.
        phrases: favoured token sequences; `vocab_size`: of the acoustic model, wanted with phrases.
        no_repeat_ngram_size: no row holds the same group of that many tokens twice; 0 = it may.
        timestamps: rules by which rows say timestamps; None = the model was told to say none.
    """

    settings: BeamSettings
    rule: Rule
    maps: tuple[Tensor | None, ...]
    unmapped: tuple[Unmapped, ...]
    normalize: Normalize = "none"
    temperatures: tuple[float, ...] | None = None
    suppressed: tuple[int, ...] = ()
    first_suppressed: tuple[int, ...] = ()
    min_new_tokens: int = 0
    end_threshold: float | None = None
    acoustic_weight: float = 1.0
    fuses_late: bool = False
    length_bonus: float = 0.0
    class_sources: tuple[ClassSource, ...] = ()
    phrases: PhraseAutomatonProtocol | None = None
    vocab_size: int = 0
    no_repeat_ngram_size: int = 0
    timestamps: TimestampRules | None = None
    backend: Backend = "auto"

    @property
    def end_id(self) -> int:
        return self.settings.end_ids[0]


@dataclass(frozen=True)
class SearchOutcome:
    """The finished hypotheses of one utterance, best first, and whether a model returned NaN for it."""

    hypotheses: list[FinishedHypothesis]
    saw_nan: bool


def search(
    scorers: Sequence[Scorer],
    contexts: Sequence[Context],
    names: Sequence[str],
    plan: SearchPlan,
    clock: StageClock,
    late: Sequence[CandidateScorer] = (),
) -> list[SearchOutcome]:
    """Beam search for argmax over y of sum_t increment(y_t), `fused_step`'s increments, under the plan's length rule.

    Utterances leave the batch when their search ends. The search itself is `RunningSearches`, of which this is the case
    where none enters. Synchronises with the device once per step.

    Args:
        scorers: the acoustic scorer first; `contexts` and `names` (stages of the clock) likewise.
        late: fresh sources that score only what survives the fused step; their parts come last.

    Returns:
        One outcome per utterance, with at most beam_size hypotheses.
    """
    running = RunningSearches(clock)
    cohort = running.admit(scorers, contexts, names, plan, late)
    while running.num_running:
        running.step()
    most = plan.settings.beam_size
    return [SearchOutcome(cohort.beams.results(u, most), bool(nan)) for u, nan in enumerate(cohort.saw_nan)]
