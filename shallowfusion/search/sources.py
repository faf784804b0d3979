"""What a search of a batch of utterances is given, in one record."""

from __future__ import annotations

from dataclasses import dataclass

from shallowfusion.fusion.rules import Rule
from shallowfusion.scorers.base import Context, Scorer
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.loop import SearchPlan

__all__ = ["Sources"]


@dataclass(frozen=True)
class Sources:
    """Everything `search` is given for a batch of utterances.

    Args:
        scorers, contexts, names: the acoustic model, the language models, and an internal LM that the rule subtracts.
        languages: of each utterance.
        late: sources that score only what survives the fused step; fresh, for one search.
        rule: as the caller gave it; the plan's own lacks what late sources weigh.
    """

    scorers: tuple[Scorer, ...]
    contexts: tuple[Context, ...]
    names: tuple[str, ...]
    plan: SearchPlan
    languages: tuple[str, ...]
    late: tuple[CandidateScorer, ...] = ()
    rule: Rule | None = None

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts of a hypothesis, in their order."""
        return (*self.names, *(scorer.name for scorer in self.late))
