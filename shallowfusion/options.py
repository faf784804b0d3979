"""What a caller may choose for one transcription."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, fields
from typing import Any, Literal

from shallowfusion.config import DRIVERS, BeamSettings, Driver, StopRule, require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.catalogue import piecewise, static
from shallowfusion.fusion.coverage import COVERAGE_KINDS, CoverageKind
from shallowfusion.fusion.rules import END_POLICIES, EndPolicy, Rule

__all__ = ["DecodingOptions"]

DEFAULT_LM_WEIGHT = 0.24


@dataclass(frozen=True)
class DecodingOptions:
    """Options of one call; names and defaults as in faster-whisper, transformers and openai-whisper.

    Args:
        beam_size: live hypotheses per utterance; `num_beams` is accepted for it.
        n_best: hypotheses returned per utterance, at most beam_size.
        rule: fusion rule, for instance fusion.static(0.24). In its place `lm_weight` with `initial_steps` says
            static or piecewise. With neither, a loaded LM gets weight 0.24, the published optimum of a domain GPT-2.
        ctc_weight: share of the decoder's CTC model (ctc=...) or the acoustic model's CTC head, 0 to below 1: an
            increment is (1 - ctc_weight) * attention + ctc_weight * CTC + language models.
        length_bonus: nats per token but the end.
        length_penalty: total / length ** length_penalty ranks hypotheses; with stop_rule="whisper" None is the mean
            and a number GNMT's ((5 + length) / 6) ** length_penalty.
        patience: stop_rule="whisper" waits for round(beam_size * patience) finished hypotheses.
        early_stopping: stop_rule="hf": False, True or "never", as in transformers.
        end_policy: what language models say of the end token; None = the rule's own or "neutral".
        end_threshold: with an LM that has a say, the end token is a candidate only if its acoustic log-prob is at
            least end_threshold times that of the best token (>= 1; 1.5 is customary); None switches it off.
        stop_rule: "hf", "whisper" or "espnet".
        min_new_tokens, max_new_tokens: bounds on generated tokens; None = what the model's window leaves.
        no_repeat_ngram_size: no hypothesis says the same group of that many tokens twice, as in transformers; 0 = it
            may.
        hotwords: words and phrases to favour: {"Fallot": 4.0} in nats for saying it once, or texts alone, which get
            `hotword_weight` each; negative weights make a phrase less likely.
        hotwords_inside_words: they count inside longer words too ("art" in "heart"), not only as whole words.
        coverage_weight: the n-best are ranked by score + coverage_weight * how well cross-attention covered the sound;
            `coverage` is "threshold" (frames looked at), "gnmt" or "excess" (see `fusion.coverage`).
        min_attention_centre: hypotheses that end while the decoder looks at less than this share of the recording are
            ranked last and flagged "truncation"; 0.5 is sensible, None switches it off.
        suppress_tokens: ids never generated; "-1" or -1 = the model's own list, None or () = none.
        suppress_blank: the model's list for the first token (blank and end).
        without_timestamps: False lets the model say when segments begin and end, by Whisper's rules for timestamps.
        max_initial_timestamp: seconds, the latest at which the first segment may begin; None = any.
        initial_prompt: text the acoustic model sees as previous text.
        lm_prompt: text of the domain that language models on the acoustic model's tokenizer read first; not scored.
        language: code of a multilingual model's language, None = detected.
        task: "transcribe" or "translate".
        asr_temperature, lm_temperature: logits are divided by it before the softmax; `lm_temperature` may hold one
            number per language model.
        batch_size: utterances decoded together.
        driver: "host": the host decides every step; "device": the device does and the host follows and checks (one
            CUDA graph per step), where rule and options allow, else the host, and `timing.host_reason` of the result
            says why (docs/device.md). Captured graphs have not run on a GPU yet, so the device is not asked unless it
            is named.

    Raises:
        InvalidArgumentError: an unknown name or a value outside its range.
    """

    beam_size: int = 5
    n_best: int = 1
    rule: Rule | None = None
    lm_weight: float | None = None
    initial_steps: int = 0
    ctc_weight: float = 0.0
    length_bonus: float = 0.0
    length_penalty: float | None = 1.0
    patience: float = 1.0
    early_stopping: bool | Literal["never"] = False
    end_policy: EndPolicy | None = None
    end_threshold: float | None = 1.5
    stop_rule: StopRule = "hf"
    min_new_tokens: int = 0
    max_new_tokens: int | None = None
    no_repeat_ngram_size: int = 0
    hotwords: Mapping[str, float] | Sequence[str] | str | None = None
    hotword_weight: float = 4.0
    hotwords_inside_words: bool = False
    coverage_weight: float = 0.0
    coverage: CoverageKind = "threshold"
    min_attention_centre: float | None = None
    suppress_tokens: Sequence[int] | str | int | None = "-1"
    suppress_blank: bool = True
    without_timestamps: bool = True
    max_initial_timestamp: float | None = 1.0
    initial_prompt: str | None = None
    lm_prompt: str | None = None
    language: str | None = None
    task: Literal["transcribe", "translate"] = "transcribe"
    asr_temperature: float = 1.0
    lm_temperature: float | Sequence[float] = 1.0
    batch_size: int = 8
    driver: Driver = "host"
    num_beams: InitVar[int | None] = None

    def __post_init__(self, num_beams: int | None) -> None:
        if num_beams is not None:
            object.__setattr__(self, "beam_size", num_beams)
        for name in ("beam_size", "n_best", "batch_size"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                f"{name} must be an integer of at least 1, got {value!r}.",
            )
        require(
            self.n_best <= self.beam_size,
            f"n_best must be at most beam_size={self.beam_size}, got {self.n_best}; raise beam_size.",
        )
        require(
            self.rule is None or isinstance(self.rule, Rule),
            f"rule must be a fusion rule such as fusion.static(0.24), got {self.rule!r}.",
        )
        require(
            self.rule is None or (self.lm_weight is None and self.initial_steps == 0),
            "give either rule or lm_weight and initial_steps, got both; the rule holds both numbers.",
        )
        require(
            self.end_policy is None or self.end_policy in END_POLICIES,
            f"end_policy must be one of {', '.join(END_POLICIES)}, got {self.end_policy!r}.",
        )
        require(
            self.end_threshold is None or (math.isfinite(self.end_threshold) and self.end_threshold >= 1),
            f"end_threshold must be at least 1 or None, got {self.end_threshold!r}; 1.5 is customary.",
        )
        require(
            self.early_stopping in (False, True, "never"),
            f"early_stopping must be False, True or 'never', got {self.early_stopping!r}.",
        )
        require(self.driver in DRIVERS, f"driver must be one of {', '.join(DRIVERS)}, got {self.driver!r}.")
        require(math.isfinite(self.length_bonus), f"length_bonus must be finite, got {self.length_bonus!r}.")
        require(
            self.task in ("transcribe", "translate"),
            f"task must be 'transcribe' or 'translate', got {self.task!r}.",
        )
        several = not isinstance(self.lm_temperature, (int, float, str)) and bool(self.lm_temperature)
        own = tuple(self.lm_temperature) if several else (self.lm_temperature,)  # type: ignore[arg-type]
        for name, value in [("asr_temperature", self.asr_temperature), *(("lm_temperature", value) for value in own)]:
            require(
                isinstance(value, (int, float)) and math.isfinite(value) and value > 0,
                f"{name} must be finite and above 0, got {value!r}.",
            )
        object.__setattr__(self, "lm_temperature", own if several else own[0])
        for name in ("min_new_tokens", "no_repeat_ngram_size"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 0, f"{name} must be an integer >= 0, got {value!r}.")
        self._check_coverage()
        self._check_timestamps()
        self.weighted_hotwords()
        self._check_rule()
        self.beam_settings(end_id=0, room=448)

    @classmethod
    def of(cls, **names: Any) -> DecodingOptions:
        """Options from keyword names; an unknown one is an error that lists the known."""
        known = {entry.name for entry in fields(cls)} | {"num_beams"}
        unknown = sorted(set(names) - known)
        if unknown:
            raise InvalidArgumentError(f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        return cls(**names)

    def _check_coverage(self) -> None:
        require(math.isfinite(self.coverage_weight), f"coverage_weight must be finite, got {self.coverage_weight!r}.")
        require(
            self.coverage in COVERAGE_KINDS,
            f"coverage must be one of {', '.join(COVERAGE_KINDS)}, got {self.coverage!r}.",
        )
        require(
            self.min_attention_centre is None or 0 <= self.min_attention_centre <= 1,
            f"min_attention_centre must be from 0 to 1 or None, got {self.min_attention_centre!r}.",
        )

    def _check_timestamps(self) -> None:
        require(
            isinstance(self.without_timestamps, bool),
            f"without_timestamps must be True or False, got {self.without_timestamps!r}.",
        )
        latest = self.max_initial_timestamp
        require(
            latest is None or (isinstance(latest, (int, float)) and math.isfinite(latest) and latest >= 0),
            f"max_initial_timestamp must be seconds of at least 0 or None, got {latest!r}; 1.0 is customary.",
        )

    def weighted_hotwords(self) -> dict[str, float]:
        """Phrases and their weights in nats; empty without hotwords."""
        given = self.hotwords
        if given is None:
            return {}
        if isinstance(given, str):
            given = [given]
        if not isinstance(given, Mapping):
            require(
                isinstance(given, Sequence) and all(isinstance(text, str) for text in given),
                f"hotwords must be texts or a mapping of text to weight, got {given!r}.",
            )
            given = dict.fromkeys(given, self.hotword_weight)
        for text, weight in given.items():
            require(isinstance(text, str) and bool(text.strip()), f"hotwords must be texts, got {text!r}.")
            require(
                isinstance(weight, (int, float)) and math.isfinite(weight),
                f"the weight of hotword {text!r} must be finite (nats for saying it), got {weight!r}.",
            )
        return dict(given)

    def _check_rule(self) -> None:
        require(
            isinstance(self.ctc_weight, (int, float)) and 0 <= self.ctc_weight < 1,
            f"ctc_weight must be from 0 to below 1, got {self.ctc_weight!r}; for CTC alone use CTCDecoder.",
        )
        if self.rule is None:
            self.resolved_rule(1)

    def resolved_rule(self, num_models: int) -> Rule:
        """The rule in force with `num_models` language models loaded."""
        if self.rule is not None:
            return self.rule.for_models(num_models)
        default = DEFAULT_LM_WEIGHT if num_models else 0.0
        weight = default if self.lm_weight is None else self.lm_weight
        rule = piecewise(weight, self.initial_steps) if self.initial_steps else static(weight)
        return rule.for_models(num_models)

    def lm_temperatures(self, num_models: int) -> tuple[float, ...]:
        """The temperature of each of `num_models` language models.

        Raises:
            InvalidArgumentError: another number of temperatures than of models.
        """
        if not isinstance(self.lm_temperature, Sequence):
            return (self.lm_temperature,) * num_models
        require(
            len(self.lm_temperature) == num_models,
            f"lm_temperature holds {len(self.lm_temperature)} numbers, but {num_models} language model(s) are loaded.",
        )
        return tuple(self.lm_temperature)

    def beam_settings(self, end_id: int, room: int) -> BeamSettings:
        """Search settings for a model that ends with `end_id` and has room for `room` new tokens."""
        early = {False: "heuristic", True: "first", "never": "never"}[self.early_stopping]
        longest = room if self.max_new_tokens is None else min(room, self.max_new_tokens)
        return BeamSettings(
            beam_size=self.beam_size,
            end_ids=(end_id,),
            max_new_tokens=longest,
            stop_rule=self.stop_rule,
            length_penalty=self.length_penalty,
            early_stopping=early,  # type: ignore[arg-type]
            patience=self.patience,
        )
