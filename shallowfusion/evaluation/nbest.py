"""N-best lists as JSON lines: our results and those of other recognisers, checked before anything is computed on them.

One utterance a line: {"id", "reference" (optional), "hypotheses": [{"text", "total", "parts", "num_tokens",
"num_words"}]}. The names utt, ref, nbest and score are read for id, reference, hypotheses and total.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.word_errors import WordErrors, word_errors
from shallowfusion.results import Transcription

__all__ = [
    "ListedHypothesis",
    "NBestList",
    "list_of",
    "oracle_errors",
    "read_nbest",
    "with_references",
    "with_scores",
    "write_nbest",
]

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class ListedHypothesis:
    """One transcript of a list.

    Args:
        total: what the recogniser ranked it by, before any length rule, nats.
        parts: each model's own log-prob of it, unweighted, by name.
        num_tokens: tokens scored, the end counted; None if the recogniser did not say.
    """

    text: str
    total: float
    parts: Mapping[str, float]
    num_tokens: int | None = None

    @property
    def num_words(self) -> int:
        return len(self.text.split())


@dataclass(frozen=True)
class NBestList:
    """The hypotheses of one utterance in the recogniser's order, its first choice first."""

    id: str
    hypotheses: tuple[ListedHypothesis, ...]
    reference: str | None = None

    @property
    def first(self) -> ListedHypothesis:
        return self.hypotheses[0]

    def check(self, fewest: int = 1) -> NBestList:
        """This list, if every score is a finite number and every text is there once.

        Raises:
            InvalidArgumentError: fewer than `fewest` hypotheses, a text twice, or a score that is NaN or infinite.
        """
        require(
            len(self.hypotheses) >= fewest,
            f"the list of {self.id!r} holds {len(self.hypotheses)} hypotheses, wanted at least {fewest}; decode with a "
            "larger n_best, or accept single ones with fewest=1.",
        )
        seen: set[str] = set()
        for hypothesis in self.hypotheses:
            require(
                hypothesis.text not in seen,
                f"the list of {self.id!r} holds {hypothesis.text!r} twice; merge its duplicates first.",
            )
            seen.add(hypothesis.text)
            for name, score in {"total": hypothesis.total, **hypothesis.parts}.items():
                require(
                    math.isfinite(score),
                    f"the list of {self.id!r} has {name}={score} for {hypothesis.text!r}, wanted a finite number.",
                )
        return self

    def merged(self, normalise: Callable[[str], str] | None = None) -> NBestList:
        """One hypothesis per text, the one with the highest total, at the place of the first of them."""
        best: dict[str, ListedHypothesis] = {}
        for hypothesis in self.hypotheses:
            text = hypothesis.text if normalise is None else normalise(hypothesis.text)
            if text not in best or hypothesis.total > best[text].total:
                best[text] = replace(hypothesis, text=text)
        return replace(self, hypotheses=tuple(best.values()))


def list_of(result: Transcription, id: str | None = None, reference: str | None = None) -> NBestList:
    """The list of one of our results; equal texts of different tokens are merged.

    Raises:
        ShallowFusionError: the recording failed; its own error.
    """
    if result.error is not None:
        raise result.error
    listed = tuple(
        ListedHypothesis(found.text, found.total, dict(found.parts), len(found.tokens)) for found in result.n_best
    )
    return NBestList(result.source if id is None else id, listed, reference).merged()


def write_nbest(path: Path, lists: Iterable[NBestList]) -> None:
    """Write lists, gzip-compressed if the name ends in .gz.

    Raises:
        InvalidArgumentError: a list with a text twice or a score that is NaN or infinite.
    """
    lines = []
    for entry in lists:
        found: dict[str, Any] = {"id": entry.check().id}
        if entry.reference is not None:
            found["reference"] = entry.reference
        found["hypotheses"] = [_as_json(hypothesis) for hypothesis in entry.hypotheses]
        lines.append(json.dumps(found, ensure_ascii=False) + "\n")
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def read_nbest(path: Path, fewest: int = 2) -> list[NBestList]:
    """Read and check lists, gzip-compressed or not, in the order of the file.

    Args:
        fewest: hypotheses every list must hold; with one there is nothing to re-rank.

    Raises:
        InvalidArgumentError: no such file or no lists; a line that is no list; an id twice; what `NBestList.check`
            refuses; hypotheses of one file with different parts.
    """
    lists: list[NBestList] = []
    known: set[str] = set()
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = _list_from(json.loads(line)).check(fewest)
            require(entry.id not in known, f"the id {entry.id!r} was there before.")
            names = {tuple(sorted(hypothesis.parts)) for found in (lists[:1], [entry]) for hypothesis in _all(found)}
            require(len(names) == 1, f"hypotheses of {entry.id!r} have other parts than those before: {sorted(names)}.")
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{path}, line {number}: {error}") from error
        known.add(entry.id)
        lists.append(entry)
    require(bool(lists), f"{path} holds no n-best list.")
    return lists


def with_references(lists: Sequence[NBestList], references: Mapping[str, str]) -> list[NBestList]:
    """The lists with the references of the same ids.

    Raises:
        InvalidArgumentError: ids without a reference, or references without a list.
    """
    ids = {entry.id for entry in lists}
    alone, silent = sorted(ids - set(references)), sorted(set(references) - ids)
    require(
        not alone and not silent,
        f"lists and references do not pair: {len(alone)} lists without reference {alone[:3]}, {len(silent)} references "
        f"without list {silent[:3]}; give both for the same ids.",
    )
    return [replace(entry, reference=references[entry.id]) for entry in lists]


def with_scores(lists: Sequence[NBestList], name: str, scores: Sequence[float]) -> list[NBestList]:
    """The lists with one more part, its scores given for all hypotheses of all lists in order.

    Raises:
        InvalidArgumentError: another number of scores than hypotheses, or NaN.
    """
    texts = sum(len(entry.hypotheses) for entry in lists)
    require(len(scores) == texts, f"scores must hold one number per hypothesis, {texts}, got {len(scores)}.")
    remaining = iter(scores)
    return [
        replace(
            entry,
            hypotheses=tuple(
                replace(hypothesis, parts={**hypothesis.parts, name: float(next(remaining))})
                for hypothesis in entry.hypotheses
            ),
        ).check()
        for entry in lists
    ]


def oracle_errors(lists: Sequence[NBestList], normalise: Callable[[str], str] | None = None) -> WordErrors:
    """Word errors of the best hypothesis of each list: what no re-ranking can go below.

    Raises:
        InvalidArgumentError: a list without reference.
    """
    chosen = []
    for entry in lists:
        texts = [hypothesis.text for hypothesis in entry.hypotheses]
        own = word_errors([reference_of(entry)] * len(texts), texts, normalise)
        chosen.append(texts[min(range(len(texts)), key=lambda i, errors=own.errors: errors[i])])  # type: ignore[misc]
    return word_errors([reference_of(entry) for entry in lists], chosen, normalise)


def reference_of(entry: NBestList) -> str:
    """Raises InvalidArgumentError where there is none."""
    require(entry.reference is not None, f"the list of {entry.id!r} has no reference; pair it with with_references.")
    return str(entry.reference)


def _all(lists: Sequence[NBestList]) -> list[ListedHypothesis]:
    return [hypothesis for entry in lists for hypothesis in entry.hypotheses]


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data.startswith(_GZIP) else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} cannot be read as n-best lists: {error}.") from error
    return text.splitlines()


def _list_from(found: Any) -> NBestList:
    require(isinstance(found, dict), f"a list must be a JSON object, got {type(found).__name__}.")
    id = found.get("id", found.get("utt"))
    require(isinstance(id, str) and bool(id), f"a list must have an 'id', got {id!r}.")
    reference = found.get("reference", found.get("ref"))
    require(
        reference is None or isinstance(reference, str), f"the reference of {id!r} must be text, got {reference!r}."
    )
    entries = found.get("hypotheses", found.get("nbest"))
    require(isinstance(entries, list), f"the list of {id!r} must have 'hypotheses', got {sorted(found)}.")
    return NBestList(id, tuple(_hypothesis_from(entry, id) for entry in entries), reference)


def _hypothesis_from(found: Any, id: str) -> ListedHypothesis:
    require(
        isinstance(found, dict) and isinstance(found.get("text"), str),
        f"every hypothesis of {id!r} must have a 'text', got {found!r}.",
    )
    total = found.get("total", found.get("score"))
    parts = found.get("parts", {})
    numbers = [total, *(parts.values() if isinstance(parts, dict) else [None])]
    require(
        all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers),
        f"hypothesis {found['text']!r} of {id!r} misses a score: total={total!r}, parts={parts!r}.",
    )
    tokens = found.get("num_tokens")
    require(
        tokens is None or (isinstance(tokens, int) and tokens >= 0),
        f"num_tokens of {id!r} must be a count, got {tokens!r}.",
    )
    return ListedHypothesis(found["text"], float(total), {name: float(part) for name, part in parts.items()}, tokens)


def _as_json(hypothesis: ListedHypothesis) -> dict[str, Any]:
    found: dict[str, Any] = {"text": hypothesis.text, "total": hypothesis.total, "parts": dict(hypothesis.parts)}
    if hypothesis.num_tokens is not None:
        found["num_tokens"] = hypothesis.num_tokens
    found["num_words"] = hypothesis.num_words
    return found
