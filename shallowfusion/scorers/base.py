"""The one interface of everything that scores tokens, and what all cached transformer decoders share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shallowfusion.scorers.attention import ATTENTION
from shallowfusion.scorers.packed_rows import joined_numbers, row_numbers
from shallowfusion.scorers.prefixes import KnownPrefix, Prefixes
from shallowfusion.scorers.slots import BeamSlots, SlotPlan, decoder_cache
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["DEAD", "CachedScorer", "Context", "DecoderState", "Scorer"]

logger = logging.getLogger(__name__)

DEAD = -2  # the token of a place in [utterances, rows] where no hypothesis can be


@dataclass(frozen=True)
class Context:
    """What a batch of utterances starts from.

    Args:
        prompts: token ids of each utterance, in the scorer's own vocabulary; read, never scored.
        encoder_output: [utterances, frames, size] for acoustic scorers.
        beam_size: the most rows an utterance will have.
        max_new_tokens: the most tokens a row will gain.
        prefixes: prompts read before; None = all are read anew.
    """

    prompts: Sequence[Sequence[int]]
    beam_size: int
    max_new_tokens: int
    encoder_output: Tensor | None = None
    prefixes: Prefixes | None = None


class ScorerState(Protocol):
    """What a scorer remembers of a batch of searches: logits of the latest pass, and whatever else it needs."""

    logits: Tensor


class Scorer(Protocol):
    """Scores the next token of every live hypothesis of a batch of utterances.

    A state is handed only to the scorer that made it. Beam sizes may differ: arrays are as wide as the widest, and rows
    are numbered without the places where no hypothesis can be.

    Price: `score` is one decoder pass over as many tokens as the beam sizes of all utterances sum up to; `fork` and
    `keep` move no keys or values, except that `keep` copies one utterance per utterance that left; `admit` copies those
    that enter.
    """

    vocabulary: Vocabulary

    def start(self, context: Context) -> ScorerState:
        """Read the prompts; `state.logits` is [utterances, vocab], one row per utterance."""
        ...

    def fork(self, state: Any, parents: np.ndarray) -> Any:
        """Row k of utterance u continues from its old row parents[u, k]; int64 [utterances, beam_size]."""
        ...

    def score(self, state: Any, token_ids: np.ndarray) -> tuple[Tensor, Any]:
        """Append a token to each row, int64 [utterances, beam_size].

        -1 = this row gains no token here and keeps its logits; DEAD = it is beyond the beam of its utterance.

        Returns:
            Logits of the next token of all rows that are not DEAD, [rows, vocab], and the state.
        """
        ...

    def keep(self, state: Any, order: Sequence[int]) -> Any:
        """Drop finished utterances: place i of the new batch holds what was at place order[i]."""
        ...

    def admit(self, state: Any, fresh: Any) -> Any:
        """Put the utterances of a state that `start` just made behind those of one that runs; `fresh` is used up.

        Called between `score` and the next `keep` or `fork`. The new utterances have one row each, behind the others.
        """
        ...

    def end_scores(self, state: Any) -> Tensor:
        """Log-prob of ending now, [rows], from the latest logits."""
        ...


@dataclass
class DecoderState:
    """What a scorer remembers of a batch of searches. Owned by the scorer; `logits` may be read by anyone.

    Args:
        logits: [rows, vocab] of the latest pass.
        lengths: int64 [utterances, rows], tokens each row sees.
        histories: per utterance and row the tokens scored so far, for rows that outgrow the window.
        rows: int64 [utterances, rows], the row of `logits` each present row descends from; -1 = none.
        computed_rows: of the latest pass, logits or not.
    """

    logits: Tensor
    slots: BeamSlots
    cache: Any
    lengths: np.ndarray
    histories: list[list[tuple[int, ...]]]
    encoder_output: Tensor | None = None
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), dtype=np.int64))
    computed_rows: int = 0


class CachedScorer(ABC):
    """A transformer decoder with its keys and values in slots shared by the beams of an utterance.

    Args:
        known_fingerprint: of the model as it was on disk, if its weights were changed after loading.
    """

    known_fingerprint: str | None = None
    model: Any
    vocabulary: Vocabulary
    device: torch.device
    num_layers: int
    window: int
    has_cross_attention = False

    @abstractmethod
    def hidden_states(self, state: DecoderState, token_ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        """One decoder pass: [utterances, queries] ids and positions -> [utterances, queries, size]."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [rows, size] -> [rows, vocab]."""

    @torch.inference_mode()
    def start(self, context: Context) -> DecoderState:
        """Read the prompts in one pass with one row per utterance."""
        prompts = [self._clipped(prompt) for prompt in context.prompts]
        if context.prefixes is not None and not self.has_cross_attention:  # else keys depend on what is heard
            return self._resumed(context, prompts, context.prefixes)
        return self._read(context, prompts)

    def _fresh(self, context: Context, prompts: Sequence[Sequence[int]]) -> DecoderState:
        """A state whose slots are still empty."""
        lengths = [len(prompt) for prompt in prompts]
        most = max(lengths) + context.beam_size * (context.max_new_tokens + self.window)
        return DecoderState(
            logits=torch.empty(0),
            slots=BeamSlots(len(prompts), most, self.device),
            cache=decoder_cache(self.num_layers, self.has_cross_attention),
            lengths=np.array(lengths, dtype=np.int64)[:, None],
            histories=[[tuple(prompt)] for prompt in prompts],
            rows=np.arange(len(prompts))[:, None],
            encoder_output=context.encoder_output,
        )

    def _read(
        self, context: Context, prompts: Sequence[Sequence[int]], known: Sequence[KnownPrefix | None] = ()
    ) -> DecoderState:
        """Read prompts in one pass, but what is known of each."""
        state = self._fresh(context, prompts)
        lengths = [len(prompt) for prompt in prompts]
        before = [0 if own is None else own.length for own in known] or [0] * len(prompts)
        if any(before):
            self._preload(state, [None if own is None else own.entry.layers for own in known], before)
        longest = max(length - start for length, start in zip(lengths, before, strict=True))
        padded = torch.zeros((len(prompts), longest), dtype=torch.int64)
        for i, (prompt, start) in enumerate(zip(prompts, before, strict=True)):
            padded[i, : len(prompt) - start] = torch.tensor(prompt[start:])
        plan = state.slots.prefill(lengths, before)
        positions = (torch.tensor(before)[:, None] + torch.arange(longest)).clamp(max=self.window - 1)
        hidden = self._pass(state, padded.to(self.device), positions.to(self.device), plan)
        last = torch.tensor(lengths, device=self.device) - 1 - torch.tensor(before, device=self.device)
        state.logits = self.head(hidden[torch.arange(len(prompts), device=self.device), last])
        return state

    def _resumed(self, context: Context, prompts: Sequence[Sequence[int]], prefixes: Prefixes) -> DecoderState:
        """A state made of prompts that were read before; what was not is read once, however many begin with it."""
        keys = [tuple(prompt) for prompt in prompts]
        entries = prefixes.found(self, keys)
        missing = [prompt for prompt in dict.fromkeys(keys) if prompt not in entries]
        if missing:
            read = self._read(context, missing, [prefixes.longest(self, prompt) for prompt in missing])
            for place, prompt in enumerate(missing):
                layers = [
                    (layer.keys[place, : len(prompt)].clone(), layer.values[place, : len(prompt)].clone())
                    for layer in read.cache.layers
                ]
                entries[prompt] = prefixes.add(self, prompt, layers, read.logits[place].clone())
        state = self._fresh(context, prompts)
        state.slots.prefill([len(key) for key in keys])
        self._preload(state, [entries[key].layers for key in keys], [len(key) for key in keys])
        state.logits = torch.stack([entries[key].logits for key in keys])
        return state

    def _preload(self, state: DecoderState, known: Sequence[Any], lengths: Sequence[int]) -> None:
        """Write the first slots of each utterance: of `known`, per layer keys and values [tokens, heads, head_dim]."""
        example = next(own for own in known if own is not None)
        for i, layer in enumerate(state.cache.layers):
            both = []
            for kind in (0, 1):
                stored = example[i][kind].new_zeros((len(known), max(lengths), *example[i][kind].shape[1:]))
                for place, (own, length) in enumerate(zip(known, lengths, strict=True)):
                    if own is not None:
                        stored[place, :length] = own[i][kind][:length]
                both.append(stored)
            layer.preload(*both)

    def fork(self, state: DecoderState, parents: np.ndarray) -> DecoderState:
        """Change what each row sees; no key, value or logit is moved."""
        state.slots.fork(parents)
        utterances = np.arange(len(parents))[:, None]
        state.rows = state.rows[utterances, parents]
        state.lengths = state.lengths[utterances, parents]
        state.histories = [[old[k] for k in own] for old, own in zip(state.histories, parents, strict=True)]
        return state

    @torch.inference_mode()
    def score(self, state: DecoderState, token_ids: np.ndarray) -> tuple[Tensor, DecoderState]:
        """One pass over the new tokens; rows beyond the window are read anew from their last tokens."""
        advancing = token_ids >= 0
        full = advancing & (state.lengths >= self.window)
        for i, k in zip(*np.nonzero(advancing), strict=True):
            state.histories[i][k] += (int(token_ids[i, k]),)
        appending = advancing & ~full
        rows = row_numbers(token_ids != DEAD)
        logits = self._append(state, token_ids, appending)
        idle = token_ids == -1
        if idle.any():
            logits[torch.from_numpy(rows[idle])] = state.logits[torch.from_numpy(state.rows[idle])]
        state.lengths = state.lengths + appending
        if full.any():
            logits = self._read_anew(state, full, rows, logits)
        state.logits, state.rows = logits, rows
        return logits, state

    @torch.inference_mode()
    def keep(self, state: DecoderState, order: Sequence[int]) -> DecoderState:
        """Drop utterances; `order` is what `moves_to_front` returned for them."""
        moves = [(source, target) for target, source in enumerate(order) if source != target]
        used = state.slots.high_water()
        own = getattr(state.cache, "self_attention_cache", state.cache)
        for layer in own.layers:
            layer.keep(moves, min(used, layer.keys.shape[1]))
        if self.has_cross_attention:
            for layer in state.cache.cross_attention_cache.layers:
                layer.keep(moves, len(order))
        state.slots.keep(order)
        state.lengths = state.lengths[list(order)]
        state.histories = [state.histories[place] for place in order]
        state.rows = state.rows[list(order)]
        if state.encoder_output is not None:
            state.encoder_output = state.encoder_output[: len(order)]
        return state

    @torch.inference_mode()
    def admit(self, state: DecoderState, fresh: DecoderState) -> DecoderState:
        """Copy the keys and values of utterances that enter, and nothing else, unless room must grow."""
        (active, rows), joining = state.lengths.shape, len(fresh.lengths)
        used, held = fresh.slots.high_water(), state.slots.high_water()
        own, other = (getattr(given.cache, "self_attention_cache", given.cache) for given in (state, fresh))
        crossing = [g.cache.cross_attention_cache.layers if self.has_cross_attention else [] for g in (state, fresh)]
        logits = torch.cat([state.logits, fresh.logits])
        for layer in own.layers:  # memory first, so that nothing is half done if it is short
            layer.reserve(active, joining, max(used, held))
        for layer in crossing[0]:
            layer.reserve(joining)
        for layer, new in zip(own.layers, other.layers, strict=True):
            layer.admit(new, active, joining, used)
        for layer, new in zip(*crossing, strict=True):
            layer.admit(new, joining)
        state.slots.admit(fresh.slots, rows)
        state.lengths = np.concatenate([state.lengths, np.pad(fresh.lengths, ((0, 0), (0, rows - 1)))])
        state.histories += [[*history, *[()] * (rows - 1)] for history in fresh.histories]
        state.rows = joined_numbers(state.rows, fresh.rows, len(state.logits))
        state.logits = logits
        if state.encoder_output is not None:  # after the first pass only its shape is looked at
            state.encoder_output = state.encoder_output[:1].expand(active + joining, -1, -1)
        return state

    @torch.inference_mode()
    def trees_hidden_states(
        self, trees: Sequence[tuple[Sequence[int], Sequence[int]]], encoder_output: Tensor | None = None
    ) -> Tensor:
        """One pass over a tree of tokens per utterance; each token sees itself and its ancestors.

        Args:
            trees: tokens and parents: the node before each, -1 for the first, a parent always before its children.
            encoder_output: [utterances, frames, size] for acoustic scorers.

        Returns:
            [utterances, nodes, size]; what lies beyond the nodes of an utterance means nothing.
        """
        count, longest = len(trees), max(len(tokens) for tokens, _ in trees)
        seen = torch.eye(longest, dtype=torch.bool).repeat(count, 1, 1)  # padding sees itself, or it would be NaN
        ids = torch.zeros((count, longest), dtype=torch.int64)
        for i, (tokens, parents) in enumerate(trees):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            for node, parent in enumerate(parents):
                if parent >= 0:
                    seen[i, node] |= seen[i, parent]
        positions = (seen.sum(dim=2) - 1).to(self.device)
        slots = torch.arange(longest, device=self.device).expand(count, longest)
        state = DecoderState(
            logits=torch.empty(0),
            slots=BeamSlots(count, longest, self.device),
            cache=decoder_cache(self.num_layers, self.has_cross_attention),
            lengths=np.zeros((count, 1), dtype=np.int64),
            histories=[[()]] * count,
            encoder_output=encoder_output,
        )
        return self._pass(state, ids.to(self.device), positions, SlotPlan(slots, seen[:, None].to(self.device)))

    def end_scores(self, state: DecoderState) -> Tensor:
        """Log-prob of the end token in the latest logits, float32 [rows]."""
        return torch.log_softmax(state.logits.float(), dim=1)[:, self.vocabulary.end_id]

    def _clipped(self, prompt: Sequence[int]) -> Sequence[int]:
        """The last tokens of a prompt that leave room for one more."""
        return prompt[-(self.window - 1) :]

    def _append(self, state: DecoderState, token_ids: np.ndarray, appending: np.ndarray) -> Tensor:
        taken = token_ids != DEAD
        packs = self.packs_rows and not taken.all()
        plan = state.slots.append(appending, taken if packs else None)
        ids, positions = np.where(appending, token_ids, 0), np.minimum(state.lengths, self.window - 1)
        if packs:
            ids, positions = ids[taken][None], positions[taken][None]
        state.computed_rows = ids.size
        queries = [torch.from_numpy(own).to(self.device) for own in (ids, positions)]
        hidden = self._pass(state, queries[0], queries[1], plan).reshape(ids.size, -1)
        return self.head(hidden if len(hidden) == taken.sum() else hidden[torch.from_numpy(taken.reshape(-1))])

    @property
    def packs_rows(self) -> bool:
        """Whether a pass is over the rows of all utterances laid end to end, which the model's attention must know."""
        implementation: str | None = self.model.config._attn_implementation
        return implementation is not None and implementation.startswith(ATTENTION)

    def _read_anew(self, state: DecoderState, full: np.ndarray, rows: np.ndarray, logits: Tensor) -> Tensor:
        """Rows that outgrew the window keep its last half as their whole context."""
        logger.info("%d rows outgrew the window of %d tokens; their last half is read anew", full.sum(), self.window)
        kept = self.window // 2
        lengths = np.where(full, kept, 0)
        plan = state.slots.restart(lengths)
        ids = torch.zeros(plan.slots.shape, dtype=torch.int64)
        positions = torch.zeros(plan.slots.shape, dtype=torch.int64)
        logits = logits.clone()
        last: list[tuple[int, int, int]] = []
        for i, own in enumerate(full):
            for place, k in enumerate(np.flatnonzero(own)):
                span = slice(place * kept, (place + 1) * kept)
                ids[i, span] = torch.tensor(state.histories[i][k][-kept:])
                positions[i, span] = torch.arange(kept)
                last.append((i, span.stop - 1, int(rows[i, k])))
        hidden = self._pass(state, ids.to(self.device), positions.to(self.device), plan)
        utterances, queries, changed = (list(column) for column in zip(*last, strict=True))
        logits[changed] = self.head(hidden[utterances, queries])
        state.lengths = np.where(full, kept, state.lengths)
        return logits

    def _pass(self, state: DecoderState, ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        own = getattr(state.cache, "self_attention_cache", state.cache)
        for layer in own.layers:
            layer.plan = plan
        return self.hidden_states(state, ids, positions, plan)
