"""Prompts that were read before: their keys and values by content, so that a domain prompt is read once for all."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shallowfusion.checks import LARGEST_INTEGER, integer
from shallowfusion.scorers.fingerprints import fingerprint

__all__ = ["DEFAULT_PREFIX_BYTES", "KnownPrefix", "PrefixCache", "PrefixEntry", "Prefixes"]

DEFAULT_PREFIX_BYTES = 256 << 20
BLOCK = 16  # a prompt that was not read before may share its first blocks of tokens with one that was

Layers = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class PrefixEntry:
    """A prompt as a decoder-only model read it.

    Args:
        layers: per layer keys and values, [tokens, heads, head_dim].
        logits: [vocab], of the token after it.
    """

    prompt: tuple[int, ...]
    layers: Layers
    logits: Tensor

    @property
    def num_bytes(self) -> int:
        tensors = [self.logits, *(tensor for pair in self.layers for tensor in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, eq=False)
class KnownPrefix:
    """The first `length` tokens of an entry's prompt."""

    entry: PrefixEntry
    length: int


class PrefixCache:
    """Keys and values of prompts under a byte budget; those not used for the longest time go first.

    A prompt is known by the SHA-256 of its token ids, with fingerprint, dtype and device of the model. Only models
    whose keys depend on nothing but the tokens before them may use it: decoder-only language models. In a decoder with
    cross-attention every layer but the first depends on the recording.

    A model's fingerprint is read once: after weights were changed in place, call `clear`. May be shared by threads.

    Price: a hash per 16 tokens. A prompt is computed once, and stored once here and once in the slots of every
    utterance that runs with it.

    Args:
        budget_bytes: 0 keeps nothing.
    """

    def __init__(self, budget_bytes: int = DEFAULT_PREFIX_BYTES) -> None:
        self._budget = integer("budget_bytes", budget_bytes, 0, LARGEST_INTEGER)
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, PrefixEntry] = OrderedDict()
        self._blocks: dict[str, str] = {}  # digest of a first part -> digest of the entry it is part of
        self._models: dict[int, tuple[Any, str]] = {}
        self._used = 0
        self._evictions = 0

    @property
    def budget_bytes(self) -> int:
        return self._budget

    @property
    def used_bytes(self) -> int:
        return self._used

    @property
    def num_evictions(self) -> int:
        """Prompts that had to go since the cache was made."""
        return self._evictions

    def __len__(self) -> int:
        return len(self._entries)

    def resize(self, budget_bytes: int) -> None:
        """Change the budget; what is over it goes."""
        with self._lock:
            self._budget = integer("budget_bytes", budget_bytes, 0, LARGEST_INTEGER)
            self._evict()

    def clear(self) -> None:
        """Forget all prompts, and which models they are of."""
        with self._lock:
            self._entries.clear()
            self._blocks.clear()
            self._models.clear()
            self._used = 0

    def exact(self, model: Any, prompt: Sequence[int]) -> PrefixEntry | None:
        """The whole prompt as the model read it, if it is known."""
        with self._lock:
            digest = self._digests(model, prompt)[-1][1]
            found = self._entries.get(digest)
            if found is not None:
                self._entries.move_to_end(digest)
            return found

    def longest(self, model: Any, prompt: Sequence[int]) -> KnownPrefix | None:
        """The longest first part of the prompt that is known and leaves a token to read."""
        with self._lock:
            for length, digest in reversed(self._digests(model, prompt)):
                owner = self._blocks.get(digest)
                if owner is not None and length < len(prompt):
                    self._entries.move_to_end(owner)
                    return KnownPrefix(self._entries[owner], length)
        return None

    def add(self, model: Any, entry: PrefixEntry) -> None:
        """Keep a prompt, unless it alone is over the budget."""
        with self._lock:
            digests = self._digests(model, entry.prompt)
            own = digests[-1][1]
            if own in self._entries or entry.num_bytes > self._budget:
                return
            self._entries[own] = entry
            self._used += entry.num_bytes
            for _, digest in digests:
                self._blocks[digest] = own
            self._evict()

    def _evict(self) -> None:
        while self._used > self._budget:
            own, entry = self._entries.popitem(last=False)
            self._used -= entry.num_bytes
            self._evictions += 1
            self._blocks = {digest: owner for digest, owner in self._blocks.items() if owner != own}

    def _digests(self, model: Any, prompt: Sequence[int]) -> list[tuple[int, str]]:
        """Length and digest of the first blocks, and last those of the whole prompt."""
        running = hashlib.sha256(self._model(model).encode())
        found = []
        for start in range(0, max(1, len(prompt)), BLOCK):
            part = prompt[start : start + BLOCK]
            running.update(array("q", part).tobytes())
            found.append((start + len(part), running.hexdigest()))
        return found

    def _model(self, model: Any) -> str:
        known = self._models.get(id(model))
        if known is None or known[0] is not model:  # the model is held, so that its id stays its own
            kind = f"{model.model.dtype} {model.device}"
            known = self._models[id(model)] = (model, f"{fingerprint(model)} {kind}")
        return known[1]


@dataclass(frozen=True, eq=False)
class Prefixes:
    """A prefix cache as one batch of searches uses it.

    Args:
        counts: where "prefix_hits", "prefix_misses", "prefix_tokens_reused" and "prefix_tokens_read" are counted; one
            hit or miss per utterance and model.
    """

    cache: PrefixCache
    counts: MutableMapping[str, int]

    def found(self, model: Any, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], PrefixEntry]:
        """Those of the prompts that are known; a second utterance with a new prompt counts as a hit."""
        entries: dict[tuple[int, ...], PrefixEntry] = {}
        seen: set[tuple[int, ...]] = set()
        for prompt in prompts:
            if prompt not in seen:
                entry = self.cache.exact(model, prompt)
                if entry is not None:
                    entries[prompt] = entry
            is_hit = prompt in entries or prompt in seen
            self._count("prefix_hits" if is_hit else "prefix_misses", 1)
            self._count("prefix_tokens_reused", len(prompt) if is_hit else 0)
            seen.add(prompt)
        return entries

    def longest(self, model: Any, prompt: Sequence[int]) -> KnownPrefix | None:
        """What is known of a prompt that is not known as a whole."""
        known = self.cache.longest(model, prompt)
        reused = 0 if known is None else known.length
        self._count("prefix_tokens_reused", reused)
        self._count("prefix_tokens_read", len(prompt) - reused)
        return known

    def add(self, model: Any, prompt: tuple[int, ...], layers: Layers, logits: Tensor) -> PrefixEntry:
        """Keep a prompt that was read, and return it."""
        entry = PrefixEntry(prompt, layers, logits)
        self.cache.add(model, entry)
        return entry

    def _count(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + number
