"""Token sequences of a language model as a tree: each read once, keys and values shared by all that descend from it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.scorers.base import CachedScorer, DecoderState
from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.scorers.slots import BeamSlots, SlotPlan, decoder_cache
from shallowfusion.scorers.token_ranges import range_log_probs
from shallowfusion.values import TokenRanges

__all__ = ["TokenNode", "TokenTree"]

logger = logging.getLogger(__name__)

MOST_SLOTS = 2**24  # pages cost memory when they are used
UNREAD, WAITING = -1, -2


class TokenNode:
    """A token sequence that the model has read, or will in the next pass.

    Args:
        parent: the sequence without its last token; None for a prompt.
        token: the last token.
        log_prob: of the tokens after the prompt, nats; NaN before it is read.
        length: positions the model sees.
        row: of the tree's logits; negative where it is not read, or no longer.
        sequence: of the utterance's page pool.
        children: by token.
    """

    __slots__ = ("children", "length", "log_prob", "parent", "row", "sequence", "token")

    def __init__(self, parent: TokenNode | None, token: int) -> None:
        self.parent, self.token = parent, token
        self.log_prob = float("nan")
        self.length, self.row, self.sequence = 0, UNREAD, -1
        self.children: dict[int, TokenNode] = {}


class TokenTree:
    """Trees of token sequences of a batch of utterances.

    Price: `read` is one pass over the new tokens of the utterance that has most of them, for all utterances at once.
    Memory: keys and values once per token of a live sequence; [vocab] logits per live node.

    Args:
        model: a decoder without cross-attention.
        prompts: token ids of each utterance, read at once, not scored.
        temperature: logits are divided by it.
    """

    def __init__(self, model: CachedScorer, prompts: Sequence[Sequence[int]], temperature: float = 1.0) -> None:
        self.model, self.temperature = model, temperature
        count, device = len(prompts), model.device
        self._state = DecoderState(
            logits=torch.empty(0),
            slots=BeamSlots(0, 1, device),  # slots are given out here
            cache=decoder_cache(model.num_layers, False),
            lengths=np.zeros((count, 1), dtype=np.int64),
            histories=[],
        )
        self._pools = [PagePool(MOST_SLOTS, page_size=1) for _ in prompts]
        self._logits = torch.empty((0, len(model.vocabulary)), device=device)
        self._log_sums = torch.empty(0, device=device)
        self._free: list[int] = []
        self._live: list[list[TokenNode]] = [[] for _ in prompts]
        self._pending: list[list[TokenNode]] = [[] for _ in prompts]
        clipped = [prompt[-(model.window - 1) :] for prompt in prompts]
        self.roots = [TokenNode(None, prompt[-1]) for prompt in clipped]
        self._read(
            [[(root, list(prompt))] for root, prompt in zip(self.roots, clipped, strict=True)],
        )

    @property
    def num_nodes(self) -> int:
        """Nodes that are live."""
        return sum(map(len, self._live))

    @property
    def num_slots(self) -> int:
        """Slots of keys and values in use by all utterances."""
        return sum(pool.num_used for pool in self._pools)

    def child(self, utterance: int, parent: TokenNode, token: int) -> TokenNode:
        """The node after one more token; if it is not read, the next `read` does it. Parents come before children."""
        node = parent.children.get(token)
        if node is None:
            node = parent.children[token] = TokenNode(parent, token)
        if node.row == UNREAD:
            node.row = WAITING
            self._pending[utterance].append(node)
        return node

    def read(self) -> int:
        """Read all nodes that are new, in one pass; returns how many there were."""
        count = sum(map(len, self._pending))
        if count:
            self._read([[(node, self._unread(node)) for node in own] for own in self._pending])
            self._pending = [[] for _ in self._pending]
        return count

    def log_probs(self, nodes: Sequence[TokenNode], ranges: Sequence[tuple[int, int]], order: Tensor) -> list[float]:
        """Log-prob after nodes[i] of any of the tokens at places ranges[i] = [first, last) of `order`."""
        if not nodes:
            return []
        rows = np.array([node.row for node in nodes])
        by_row = np.argsort(rows, kind="stable")
        places = np.array(ranges, dtype=np.int32)[by_row]
        offsets = np.zeros(len(self._logits) + 1, dtype=np.int32)
        np.cumsum(np.bincount(rows, minlength=len(self._logits)), out=offsets[1:])
        found = np.empty(len(nodes), dtype=np.float32)
        found[by_row] = self._ranges(offsets, places, order, self._log_sums).log_probs.cpu().numpy()
        answers: list[float] = found.tolist()
        return answers

    def favourite(self, node: TokenNode) -> float:
        """Log-prob of the best token after a node."""
        best = self._logits[node.row].amax().float() / self.temperature - self._log_sums[node.row]
        return float(best)

    def retain(self, live: Sequence[Iterable[TokenNode]]) -> None:
        """Forget all nodes but these, one collection per utterance; what they descend from stays in the cache."""
        for utterance, wanted in enumerate(live):
            kept = set(wanted)
            pool = self._pools[utterance]
            for node in self._live[utterance]:
                if node not in kept:
                    self._forget(node, pool)
            self._live[utterance] = [node for node in self._live[utterance] if node in kept]

    @torch.inference_mode()
    def keep(self, order: Sequence[int]) -> None:
        """Drop finished utterances: place i of the new batch holds what was at place order[i]."""
        for place in set(range(len(self._pools))) - set(order):
            self.retain([[] if u == place else own for u, own in enumerate(self._live)])
        moves = [(source, target) for target, source in enumerate(order) if source != target]
        used = max(pool.high_water for pool in self._pools)
        for layer in self._state.cache.layers:
            layer.keep(moves, min(used, layer.keys.shape[1]))
        self._pools = [self._pools[place] for place in order]
        self._live = [self._live[place] for place in order]
        self._pending = [self._pending[place] for place in order]
        self.roots = [self.roots[place] for place in order]

    def _forget(self, node: TokenNode, pool: PagePool) -> None:
        pool.release(node.sequence)
        self._free.append(node.row)
        node.row = UNREAD
        if node.parent is not None and not node.children:  # one with children must be found again by its token
            del node.parent.children[node.token]

    def _unread(self, node: TokenNode) -> list[int]:
        """The tokens to read for a node: its last one, or half a window of them once the window is full."""
        assert node.parent is not None
        node.length = node.parent.length + 1
        if node.length <= self.model.window:
            return [node.token]
        tokens: list[int] = []
        at: TokenNode | None = node
        while at is not None and len(tokens) < self.model.window // 2:
            tokens.append(at.token)
            at = at.parent
        logger.info("a hypothesis outgrew the window of %d tokens; its last half is read anew", self.model.window)
        return tokens[::-1]

    @torch.inference_mode()
    def _read(self, wanted: Sequence[Sequence[tuple[TokenNode, list[int]]]]) -> None:
        """One pass over the tokens of each node; a node of several tokens sees nothing before them."""
        ids, positions, slots, visible, last = self._plan(wanted)
        device = self.model.device
        plan = SlotPlan(torch.from_numpy(slots).to(device), torch.from_numpy(visible).to(device)[:, None])
        hidden = self.model._pass(
            self._state, torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device), plan
        )
        nodes = [node for own in wanted for node, _ in own]
        utterances, queries = (torch.tensor(column, device=device) for column in zip(*last, strict=True))
        self._store(nodes, self.model.head(hidden[utterances, queries]))
        for own, fresh in zip(self._live, wanted, strict=True):
            own.extend(node for node, _ in fresh)
        self._score(nodes)

    def _plan(self, wanted: Sequence[Sequence[tuple[TokenNode, list[int]]]]) -> tuple[Any, Any, Any, Any, Any]:
        """Ids, positions and slots [utterances, queries], what each query sees, and the last query of each node."""
        width = max(sum(len(tokens) for _, tokens in own) for own in wanted)
        ids = np.zeros((len(wanted), width), dtype=np.int64)
        positions = np.zeros_like(ids)
        seen: list[tuple[int, int, npt.NDArray[np.int32]]] = []
        last: list[tuple[int, int]] = []
        for utterance, own in enumerate(wanted):
            pool, query = self._pools[utterance], 0
            for node, tokens in own:
                alone = node.parent is None or len(tokens) > 1
                node.sequence = pool.create() if alone else pool.fork(node.parent.sequence)  # type: ignore[union-attr]
                pool.append(node.sequence, len(tokens))
                where = pool.slots(node.sequence)
                node.length = len(where)
                for place, token in enumerate(tokens, len(where) - len(tokens)):
                    ids[utterance, query], positions[utterance, query] = token, place
                    seen.append((utterance, query, where[: place + 1]))
                    query += 1
                last.append((utterance, query - 1))
        scratch = max(pool.high_water for pool in self._pools)  # idle queries write where nobody looks
        slots = np.full_like(ids, scratch)
        visible = np.zeros((*ids.shape, scratch + 1), dtype=bool)
        visible[:, :, scratch] = True
        for utterance, query, where in seen:
            slots[utterance, query] = where[-1]
            visible[utterance, query, where] = True
            visible[utterance, query, scratch] = False
        return ids, positions, slots, visible, last

    def _store(self, nodes: Sequence[TokenNode], logits: Tensor) -> None:
        if len(self._free) < len(nodes):
            old, size = self._logits, max(2 * len(self._logits), len(self._logits) + len(nodes))
            self._logits = logits.new_zeros((size, logits.shape[1]))
            self._logits[: len(old)] = old
            self._log_sums = torch.cat([self._log_sums, self._log_sums.new_zeros(size - len(old))])
            self._free.extend(range(size - 1, len(old) - 1, -1))
        for node in nodes:
            node.row = self._free.pop()
        self._logits[[node.row for node in nodes]] = logits

    def _score(self, nodes: Sequence[TokenNode]) -> None:
        """Log-sum-exps of the new rows, then each node's own log-prob, parents before children."""
        asked = np.zeros(len(self._logits) + 1, dtype=np.int32)
        asked[[node.row + 1 for node in nodes]] = 1
        found = self._ranges(np.cumsum(asked, dtype=np.int32), np.zeros((len(nodes), 2), dtype=np.int32), None, None)
        rows = torch.tensor([node.row for node in nodes], device=self._logits.device)
        self._log_sums[rows] = found.log_sums[rows]
        parents = [0 if node.parent is None else node.parent.row for node in nodes]
        tokens = [node.token for node in nodes]
        steps = self._logits[parents, tokens].float() / self.temperature - self._log_sums[parents]
        for node, step in zip(nodes, steps.tolist(), strict=True):
            node.log_prob = 0.0 if node.parent is None else node.parent.log_prob + step

    def _ranges(self, offsets: Any, places: Any, order: Tensor | None, log_sums: Tensor | None) -> Any:
        device = self._logits.device
        first, last = (torch.from_numpy(np.ascontiguousarray(places[:, side])).to(device) for side in (0, 1))
        ranges = TokenRanges(torch.from_numpy(offsets).to(device), first, last)
        return range_log_probs(self._logits, ranges, order=order, log_sums=log_sums, temperature=self.temperature)
