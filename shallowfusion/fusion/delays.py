"""How a delayed language model is fused: when it is asked, of how much text, and what stands in for it meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shallowfusion.config import require

__all__ = ["Delay", "ProxyForm", "ScoreSpan", "SpellingUnit", "Tail", "Trigger"]

Trigger = Literal["shortest", "interval", "hybrid"]
ScoreSpan = Literal["all", "common"]
SpellingUnit = Literal["auto", "tokens", "words", "characters"]
Tail = Literal["mean", "free"]
ProxyForm = Literal["replace", "add"]
CHOICES: dict[str, tuple[str, ...]] = {
    "trigger": ("shortest", "interval", "hybrid"),
    "score_span": ("all", "common"),
    "unit": ("auto", "tokens", "words", "characters"),
    "tail": ("mean", "free"),
    "proxy_form": ("replace", "add"),
}


@dataclass(frozen=True)
class Delay:
    """When a language model is asked about the hypotheses that survived, and about how much of their text.

    Args:
        trigger: "shortest": the hypothesis with the fewest complete units has gained one. "interval": every `interval`
            steps. "hybrid": at least `interval` steps have passed since the last time, and there is something new.
        interval: steps: tokens of an attention decoder, frames of a CTC model; None = never before the end, which is
            rescoring of the final beam.
        score_span: "all": every complete unit of every hypothesis. "common": as many units of each as all have.
        unit: "tokens" of the acoustic model, for a language model on the same; "words", or single characters in
            scripts without spaces; "characters". "auto" is "tokens" where the tokenizers agree, else "words".
        tail: what the text that was not scored yet costs meanwhile. "mean": what a byte of the utterance's scored text
            cost on the average, so that a hypothesis gains nothing by putting off the end of a word; "free": nothing,
            as published.
        lower: the language model reads the text lower-cased.
        proxy_form: of a second language model that scores at once: "replace" takes its scores back where the delayed
            model has spoken, "add" keeps them.
    """

    trigger: Trigger = "interval"
    interval: int | None = 8
    score_span: ScoreSpan = "all"
    unit: SpellingUnit = "auto"
    tail: Tail = "mean"
    lower: bool = False
    proxy_form: ProxyForm = "replace"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            require(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}.")
        whole = isinstance(self.interval, int) and not isinstance(self.interval, bool)
        require(
            self.interval is None or (whole and self.interval >= 1),
            f"interval must be a number of steps of at least 1, or None for the end only, got {self.interval!r}.",
        )
        require(
            self.trigger != "shortest" or self.interval is not None,
            'interval=None goes with trigger="interval"; "shortest" does not look at the interval.',
        )
