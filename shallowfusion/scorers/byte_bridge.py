"""A language model with another tokenizer inside the search: both models agree on bytes, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from shallowfusion.config import require
from shallowfusion.errors import VocabularyError
from shallowfusion.scorers.byte_covers import ByteCover, Segmenter, last_word
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.token_tree import TokenNode, TokenTree
from shallowfusion.text.byte_order import ByteOrder
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["BridgeSettings", "ByteBridge", "ByteLanguage"]

Ending = Literal["lm", "neutral", "asr_only"]
ENDINGS = ("lm", "neutral", "asr_only")
IMPOSSIBLE = float("-inf")


@dataclass(frozen=True)
class BridgeSettings:
    """What the bridge keeps, and what it says of the acoustic end and special tokens.

    Args:
        covers: "canonical": the usual cut of the text and what is still open beside it; "all": every cut, which is
            exact and grows exponentially with the text: for toys.
        max_open: with "canonical", sequences kept per hypothesis beside the usual cut.
        min_share: with "canonical", those with less than this share of the text's probability are let go.
        ending: of the end token: "lm": log-prob of the language model ending here; "neutral": as much as of its
            favourite next token; "asr_only": 0. Tokens without text get 0 with "asr_only" and else the favourite's.
        temperature: the language model's logits are divided by it.
    """

    covers: Literal["canonical", "all"] = "canonical"
    max_open: int = 4
    min_share: float = 1e-6
    ending: Ending = "neutral"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.covers in ("canonical", "all"), f"covers must be 'canonical' or 'all', got {self.covers!r}.")
        require(self.max_open >= 0, f"max_open must be an integer >= 0, got {self.max_open!r}.")
        require(0 <= self.min_share < 1, f"min_share must be from 0 to below 1, got {self.min_share!r}.")
        require(self.ending in ENDINGS, f"ending must be one of {', '.join(ENDINGS)}, got {self.ending!r}.")


class ByteLanguage:
    """A language model with what a bridge from an acoustic model's tokens needs of it; made once, shared by searches.

    Args:
        model: any tokenizer whose tokens stand for bytes.
        acoustic: the vocabulary of the search.

    Raises:
        VocabularyError: a byte of the acoustic model's tokens cannot be said with the language model's.
    """

    def __init__(self, model: CausalLMScorer, acoustic: Vocabulary) -> None:
        self.model, self.acoustic = model, acoustic
        tokens = model.vocabulary.tokens
        self.order = ByteOrder(tokens)
        self.segmenter = Segmenter(self.order, tokens, model.tokenizer)
        padded = np.zeros(-(-len(tokens) // 16) * 16, dtype=np.int32)  # lets a GPU load 16 bytes at a time
        padded[: len(tokens)] = self.order.order
        self.places = torch.from_numpy(padded).to(model.device)[: len(tokens)]
        used = {byte for token in acoustic.tokens if token for byte in token}
        missing = sorted(used & self.order.missing_bytes())
        if missing:
            raise VocabularyError(
                f"{len(missing)} bytes of the acoustic model's tokens ({acoustic.name}) are no tokens of the language "
                f"model ({model.vocabulary.name}), the first is {bytes(missing[:1])!r}; wanted a language model that "
                "can say every byte (byte-level BPE, or SentencePiece with byte fallback)."
            )


Key = tuple[int, int, int]  # utterance, lane, acoustic token


@dataclass(frozen=True, eq=False)
class Extension:
    """A hypothesis with one more piece of text, before its probability is known.

    Args:
        open: as in `ByteCover`, up to before the end of the text.
        chain: the sequences of the usual cut, the anchor first, up to before the end.
        cut: the tokens of the usual cut after the anchor; empty where covers are "all".
    """

    open: tuple[tuple[TokenNode, bytes], ...]
    anchor: TokenNode
    tail: bytes
    chain: tuple[TokenNode, ...]
    cut: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scored:
    """A candidate: log P of its text (or of what stands for it), and log P through each open sequence."""

    log_prob: float
    extension: Extension | None = None
    through: tuple[float, ...] = ()


class ByteBridge:
    """log P(bytes of the next acoustic token | bytes so far) under a language model with another tokenizer.

    P(text) is the probability that the language model's tokens, read as bytes, begin with the text: the sum over all
    its covers, token sequences that reach the end of the text with their last token,

        P(text) = sum over sequences s whose bytes are a beginning of the text, but not all of it,
                  of P(s) * P(the next token starts with the rest of the text | s)
        increment(piece) = log P(text piece) - log P(text)

    where the inner sum is one range of the vocabulary in order of bytes. Increments add up to log P of the whole text.

    Exact: with covers="all" everything. With covers="canonical" each cover that is counted is counted exactly; left out
    are covers through sequences that are neither a beginning of the usual cut of the text nor were one at the end of an
    earlier acoustic token, and those let go by `max_open` and `min_share`. So log P(text) is a lower bound; with
    byte-level BPE, whose models hardly ever leave the usual cut, it is tight.

    Price: one pass of the language model per step over one token per row (the end of its text), and one more in steps
    where some candidate's usual cut has a boundary inside the new piece. Keys and values once per distinct token
    sequence of an utterance. A logits row per open sequence.

    One object serves one batch of searches; see `CandidateScorer`.

    Args:
        language: the model.
        prompts: of the language model, token ids per utterance, read, not scored.
        end_id: the acoustic end token.
        weight: increments are multiplied by it, and by `schedule(step)` if there is one: `self.weight` is the product.
        name: of its part in the results.

    Source: 2405.14259 (the sum), 2410.09303 (covers), 2506.14123 (valid covers); sharing of what is read is ours.
    """

    def __init__(
        self,
        language: ByteLanguage,
        prompts: Sequence[Sequence[int]],
        end_id: int,
        weight: float,
        settings: BridgeSettings | None = None,
        schedule: Callable[[int], float] | None = None,
        name: str = "lm",
    ) -> None:
        self.name, self.settings = name, settings or BridgeSettings()
        self._language, self._end_id = language, end_id
        self._full_weight, self._schedule, self._step = weight, schedule or (lambda step: 1.0), 0
        self.weight = weight * self._schedule(0)
        self.tree = TokenTree(language.model, prompts, self.settings.temperature)
        self.num_passes = 1
        self._rows = [[ByteCover(0.0, ((root, b""),), root, b"", (root,))] for root in self.tree.roots]
        self._scored: dict[Key, Scored] = {}

    def log_probs(self) -> npt.NDArray[np.float64]:
        """log P(text) of every row, [utterances, rows]."""
        return np.array([[cover.log_prob for cover in own] for own in self._rows])

    def increments(self, lanes: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32 [utterances, candidates], nats; 0 where there is no candidate."""
        keys = [(int(u), int(lanes[u, c]), int(tokens[u, c])) for u, c in zip(*np.nonzero(lanes >= 0), strict=True)]
        self._score(keys)
        found = np.zeros(tokens.shape, dtype=np.float32)
        found[np.nonzero(lanes >= 0)] = [
            _difference(self._scored[key].log_prob, self._rows[key[0]][key[1]].log_prob) for key in keys
        ]
        return found

    def follow(self, parents: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> None:
        """Row k of utterance u continues its old row parents[u, k] with tokens[u, k]."""
        keys = [
            [(u, int(p), int(t)) for p, t in zip(*row, strict=True)] for u, row in enumerate(_pairs(parents, tokens))
        ]
        self._score([key for own in keys for key in own if key[2] >= 0 and key not in self._scored])
        ends: dict[Key, list[TokenNode]] = {}
        for key in dict.fromkeys(key for own in keys for key in own):
            scored = self._scored.get(key)
            if scored is not None and scored.extension is not None:
                ends[key] = self._ends(key[0], scored.extension)
        self._read()
        closed = {key: self._closed(self._scored[key], own) for key, own in ends.items()}
        self._rows = [[closed.get(key, self._rows[key[0]][key[1]]) for key in own] for own in keys]
        self.tree.retain(
            [[node for cover in own for node in (*cover.chain, *(n for n, _ in cover.open))] for own in self._rows]
        )
        self._scored.clear()
        self._step += 1
        self.weight = self._full_weight * self._schedule(self._step)

    def keep(self, order: Sequence[int]) -> None:
        """Drop finished utterances."""
        self.tree.keep(order)
        self._rows = [self._rows[place] for place in order]

    def _read(self) -> None:
        self.num_passes += self.tree.read() > 0

    def _score(self, keys: Sequence[Key]) -> None:
        """log P of the text of each (utterance, lane, token), with what `follow` needs of it."""
        extensions: dict[Key, Extension] = {}
        for key in keys:
            piece = None if key[2] == self._end_id else self._language.acoustic.tokens[key[2]]
            cover = self._rows[key[0]][key[1]]
            extension = self._extension(key[0], cover, piece) if piece else None
            if extension is not None:
                extensions[key] = extension
            else:
                self._scored[key] = Scored(IMPOSSIBLE if piece else self._without_text(cover, key[2] == self._end_id))
        self._read()
        wanted = list(dict.fromkeys(pair for extension in extensions.values() for pair in extension.open))
        places = self._language.order.prefix_range
        values = self.tree.log_probs(
            [node for node, _ in wanted], [places(rest) for _, rest in wanted], self._language.places
        )
        by_pair = {(node, rest): node.log_prob + value for (node, rest), value in zip(wanted, values, strict=True)}
        for key, extension in extensions.items():
            through = tuple(by_pair[pair] for pair in extension.open)
            self._scored[key] = Scored(_log_sum(through), extension, through)

    def _without_text(self, cover: ByteCover, is_end: bool) -> float:
        """log P of the text and the end, or what stands for it."""
        if self.settings.ending == "asr_only":
            return cover.log_prob
        ended = [node for node, rest in cover.open if not rest]
        if is_end and self.settings.ending == "lm":
            place = int(self._language.order.places[self._language.model.vocabulary.end_id])
            values = self.tree.log_probs(ended, [(place, place + 1)] * len(ended), self._language.places)
            return _log_sum([node.log_prob + value for node, value in zip(ended, values, strict=True)])
        best = max(ended, key=lambda node: node.log_prob, default=None)
        return cover.log_prob if best is None else cover.log_prob + self.tree.favourite(best)

    def _extension(self, utterance: int, cover: ByteCover, piece: bytes) -> Extension | None:
        """The sequences that end before the end of the longer text; new ones wait to be read."""
        longer = tuple((node, rest + piece) for node, rest in cover.open)
        if self.settings.covers == "all":
            found = dict.fromkeys(longer)
            for (node, _), (_, old) in zip(longer, cover.open, strict=True):
                self._every_cut(utterance, node, old + piece, len(old), found)
            return Extension(tuple(found), cover.anchor, b"", (), ())
        tail = cover.tail + piece
        cut = self._language.segmenter(tail)
        if cut is None:
            return None
        chain, rest, node = [cover.anchor], tail, cover.anchor
        pairs = dict.fromkeys(longer)
        for token in cut[:-1]:
            pairs[node, rest] = None
            node = self.tree.child(utterance, node, token)
            rest = rest[len(self._language.model.vocabulary.tokens[token] or b"") :]
            chain.append(node)
        pairs[node, rest] = None
        places = self._language.order.prefix_range
        kept = tuple(pair for pair in pairs if places(pair[1]) != (0, 0))
        return Extension(kept, cover.anchor, tail, tuple(chain), cut)

    def _every_cut(
        self, utterance: int, node: TokenNode, rest: bytes, read: int, found: dict[tuple[TokenNode, bytes], None]
    ) -> None:
        """All sequences after `node` that end behind the first `read` bytes of `rest` and before its end."""
        for length in range(read + 1, min(len(rest), self._language.order.longest + 1)):
            for token in self._language.order.tokens_of(rest[:length]):
                child = self.tree.child(utterance, node, token)
                found[child, rest[length:]] = None
                self._every_cut(utterance, child, rest[length:], 0, found)

    def _ends(self, utterance: int, extension: Extension) -> list[TokenNode]:
        """The sequences that end where the text ends; new ones wait to be read."""
        if self.settings.covers == "canonical":
            return [self.tree.child(utterance, extension.chain[-1], extension.cut[-1])]
        return [
            self.tree.child(utterance, node, token)
            for node, rest in extension.open
            for token in self._language.order.tokens_of(rest)
        ]

    def _closed(self, scored: Scored, ends: Sequence[TokenNode]) -> ByteCover:
        """What is kept of a text that is now part of a hypothesis."""
        extension = scored.extension
        assert extension is not None
        now = tuple((node, b"") for node in ends)
        if self.settings.covers == "all":
            places = self._language.order.prefix_range
            still = tuple(pair for pair in extension.open if places(pair[1]) != (0, 0))
            return ByteCover(scored.log_prob, (*still, *now), extension.anchor, b"", (extension.anchor,))
        chain = (*extension.chain, *ends)
        anchor, tail = extension.anchor, extension.tail
        start = last_word(tail)
        if start:
            lengths = np.cumsum([len(self._language.model.vocabulary.tokens[t] or b"") for t in extension.cut])
            place = 1 + int(np.searchsorted(lengths, start))
            anchor, tail, chain = chain[place], tail[start:], chain[place:]
        return ByteCover(scored.log_prob, (*self._strongest(extension, scored), *now), anchor, tail, chain)

    def _strongest(self, extension: Extension, scored: Scored) -> list[tuple[TokenNode, bytes]]:
        """Open sequences worth keeping: the usual cut's, and few beside it."""
        usual = set(extension.chain)
        least = math.log(self.settings.min_share) if self.settings.min_share else IMPOSSIBLE
        kept, beside = [], []
        for pair, through in zip(extension.open, scored.through, strict=True):
            if pair[0] in usual:
                kept.append(pair)
            elif through - scored.log_prob >= least:
                beside.append((through, pair))
        beside.sort(key=lambda item: -item[0])
        return [*kept, *(pair for _, pair in beside[: self.settings.max_open])]


def _pairs(parents: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> list[tuple[list[int], list[int]]]:
    return list(zip(parents.tolist(), tokens.tolist(), strict=True))


def _log_sum(values: Sequence[float]) -> float:
    if any(map(math.isnan, values)):
        return math.nan
    largest = max(values, default=IMPOSSIBLE)
    if not largest > IMPOSSIBLE:
        return IMPOSSIBLE
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def _difference(new: float, old: float) -> float:
    """new - old; what is impossible stays so, and NaN NaN."""
    return IMPOSSIBLE if new == IMPOSSIBLE or old == IMPOSSIBLE else new - old
