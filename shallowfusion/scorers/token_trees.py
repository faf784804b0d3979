"""Texts read by a causal language model as trees of tokens that grow, fork and die, with keys and values kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.scorers.slots import SlotPlan, decoder_cache

__all__ = ["Request", "TextNode", "TokenTrees"]

HEAD_ROWS = 256  # rows of logits that exist at a time
MOST_SLOTS = 1 << 24  # ids only; memory is taken as slots are used


@dataclass(eq=False)
class TextNode:
    """A text: the tokens from the root to here.

    Args:
        parent: the text without its last token; None for the root, whose prompt is read and never scored.
        token: the last token.
        reads: what a pass reads for it: its token, or, where the window is full, the last half of the window anew.
        position: of the last token it reads.
        is_fresh: it sees what it reads and nothing else.
        holders: hypotheses and children that need it.
        total: log-prob of the text, nats; NaN until it is scored.
        hidden: [size], the model's state after the last token; None until something after it is scored.
        sequence: of the page pool; -1 until it is read.
    """

    parent: TextNode | None
    token: int
    reads: tuple[int, ...]
    position: int
    is_fresh: bool = False
    holders: int = 0
    total: float = math.nan
    hidden: Tensor | None = None
    sequence: int = -1
    children: dict[int, TextNode] = field(default_factory=dict)

    def tokens(self) -> list[int]:
        """The prompt's and the text's tokens."""
        found: list[int] = []
        node = self
        while node.parent is not None:
            found.append(node.token)
            node = node.parent
        return [*node.reads, *reversed(found)]


@dataclass(frozen=True, eq=False)
class Request:
    """A text to be scored.

    Args:
        place: of its utterance in the batch.
        node: the text.
        with_end: whether the end after it is wanted as well.
    """

    place: int
    node: TextNode
    with_end: bool = False


class TokenTrees:
    """One tree of token sequences per utterance: equal beginnings are read once, and nothing is read in vain.

    A token's log-prob comes from the state after the token before it, so the last token of a text is read only when
    something after it is scored; a hypothesis that dies before costs nothing. States are kept, not distributions: for
    GPT-2 768 numbers a token in place of 50,257. To take tokens back is to walk to another branch; slots of branches
    that nobody holds are free again. Utterances keep their places for good, and take part in a pass when there is
    something new of them.

    Price: `score` is at most one padded pass over the utterances that have something new to read, and one row of
    logits per text that is continued. Memory per token: keys, values and one state.

    Args:
        scorer: the model.
        num_utterances: of the batch.
        context: ids that are read before every text and not scored.
        temperature: logits are divided by it.
    """

    def __init__(
        self, scorer: CausalLMScorer, num_utterances: int, context: Sequence[int] = (), temperature: float = 1.0
    ) -> None:
        self.scorer = scorer
        self.temperature = temperature
        self.num_utterances = num_utterances
        self.num_calls = 0
        self.num_tokens = 0
        prompt = tuple(scorer.prompt(context))[-(scorer.window - 1) :]
        self._cache = decoder_cache(scorer.num_layers, False)
        self._pools = [PagePool(MOST_SLOTS, page_size=1) for _ in range(num_utterances)]
        self._roots = [
            TextNode(None, -1, prompt, len(prompt) - 1, is_fresh=True, holders=1, total=0.0)
            for _ in range(num_utterances)
        ]

    @property
    def num_used(self) -> int:
        """Slots in use by all utterances."""
        return sum(pool.num_used for pool in self._pools)

    def grow(self, place: int, ids: Sequence[int]) -> TextNode:
        """The text of these tokens, held for the caller; nothing is read or scored yet."""
        node = self._roots[place]
        for token in ids:
            child = node.children.get(token)
            if child is None:
                child = self._child(node, int(token))
                node.children[token] = child
                node.holders += 1
            node = child
        node.holders += 1
        return node

    def hold(self, node: TextNode) -> TextNode:
        """One more holder."""
        node.holders += 1
        return node

    def drop(self, place: int, node: TextNode) -> None:
        """One holder less; texts that nobody holds are forgotten."""
        node.holders -= 1
        while node.holders == 0 and node.parent is not None:
            if node.sequence >= 0:
                self._pools[place].release(node.sequence)
            del node.parent.children[node.token]
            node = node.parent
            node.holders -= 1

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> npt.NDArray[np.float64]:
        """Make sure of the `total` of every requested text, in one pass.

        Returns:
            float64 [requests, 2]: where asked for, the log-prob of the end after the text, and the largest log-prob of
            anything there; NaN elsewhere.
        """
        edges: list[TextNode] = []  # scored by the state of their parent; a parent before its children
        unread: list[dict[TextNode, None]] = [{} for _ in self._roots]
        seen: set[TextNode] = set()
        for request in requests:
            chain = _upwards(request.node, lambda node: math.isnan(node.total) and node not in seen)
            seen.update(chain)
            edges += chain
            wanted = [node.parent for node in chain] + [request.node if request.with_end else None]
            for node in wanted:
                if node is not None:
                    unread[request.place].update(dict.fromkeys(_upwards(node, lambda node: node.hidden is None)))
        if any(unread):
            self._read(unread)
        ended = {request.node: request for request in requests if request.with_end}
        return self._scored(edges, list(ended), requests)

    def _child(self, parent: TextNode, token: int) -> TextNode:
        if parent.position + 1 < self.scorer.window:
            return TextNode(parent, token, (token,), parent.position + 1)
        kept = (*parent.tokens(), token)[-max(1, self.scorer.window // 2) :]
        return TextNode(parent, token, kept, len(kept) - 1, is_fresh=True)

    def _read(self, unread: Sequence[dict[TextNode, None]]) -> None:
        """One pass over new texts, of each place parents before children."""
        is_first = not self._cache.layers[0].is_initialized
        if is_first:  # keys and values of every utterance get their place
            unread = [dict.fromkeys((root, *new)) for root, new in zip(self._roots, unread, strict=True)]
        places = [place for place, new in enumerate(unread) if new]
        slots, visible, ids, positions = self._plan([(self._pools[place], list(unread[place])) for place in places])
        device = self.scorer.device
        lanes = None if len(places) == len(self._roots) else torch.tensor(places, device=device)
        plan = SlotPlan(torch.from_numpy(slots).to(device), torch.from_numpy(visible)[:, None].to(device), lanes)
        hidden = self.scorer.read(
            self._cache, torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device), plan
        )
        for row, place in enumerate(places):
            query = -1
            for node in unread[place]:
                query += len(node.reads)
                node.hidden = hidden[row, query]
            self.num_tokens += query + 1
        self.num_calls += 1

    def _plan(self, new: Sequence[tuple[PagePool, list[TextNode]]]) -> tuple[npt.NDArray[np.int64], ...]:
        """Slots, visibility, ids and positions [places, queries] of new texts; idle queries look at themselves."""
        width = max(sum(len(node.reads) for node in nodes) for _, nodes in new)
        taken = [[_append(pool, node) for node in nodes] for pool, nodes in new]
        scratch = max(pool.high_water for pool, _ in new)
        shape = (len(new), width)
        slots, ids, positions = np.full(shape, scratch), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        visible = np.zeros((*shape, scratch + 1), dtype=bool)
        visible[:, :, scratch] = True
        for row, (pool, nodes) in enumerate(new):
            seen = pool.visibility([node.sequence for node in nodes])
            query = 0
            for node, own, sight in zip(nodes, taken[row], seen, strict=True):
                span = slice(query, query + len(own))
                slots[row, span] = own
                ids[row, span] = node.reads
                positions[row, span] = np.arange(node.position + 1 - len(own), node.position + 1)
                if len(own) == 1:
                    visible[row, query, : len(sight)] = sight
                else:  # the prompt, or a window begun anew: alone in its sequence
                    visible[row, np.arange(span.start, span.stop)[:, None], own[None, :]] = np.tri(len(own), dtype=bool)
                visible[row, span, scratch] = False
                query = span.stop
        return slots, visible, ids, positions

    def _scored(
        self, edges: Sequence[TextNode], ended: Sequence[TextNode], requests: Sequence[Request]
    ) -> npt.NDArray[np.float64]:
        parents = list(dict.fromkeys([*(node.parent for node in edges if node.parent is not None), *ended]))
        rows = {node: row for row, node in enumerate(parents)}
        edge_rows = np.array([rows[node.parent] for node in edges if node.parent is not None], dtype=np.int64)
        tokens = np.array([node.token for node in edges], dtype=np.int64)
        log_probs, ends = np.zeros(len(edges)), np.zeros((len(parents), 2))
        for start in range(0, len(parents), HEAD_ROWS):
            chunk = parents[start : start + HEAD_ROWS]
            logits = self.scorer.head(torch.stack([node.hidden for node in chunk if node.hidden is not None])).float()
            own = np.flatnonzero((edge_rows >= start) & (edge_rows < start + HEAD_ROWS))
            places = torch.from_numpy(edge_rows[own] - start).to(logits.device)
            chosen = torch.from_numpy(tokens[own]).to(logits.device)
            scores = torch.log_softmax(logits / self.temperature, dim=1)
            log_probs[own] = scores[places, chosen].double().cpu().numpy()
            two = torch.stack([scores[:, self.scorer.vocabulary.end_id], scores.max(dim=1).values], dim=1)
            ends[start : start + len(chunk)] = two.double().cpu().numpy()
        for node, log_prob in zip(edges, log_probs.tolist(), strict=True):
            assert node.parent is not None
            node.total = node.parent.total + log_prob
        nothing = np.full(2, np.nan)
        found = [ends[rows[request.node]] if request.with_end else nothing for request in requests]
        return np.array(found, dtype=np.float64).reshape(len(requests), 2)


def _upwards(node: TextNode, wanted) -> list[TextNode]:  # type: ignore[no-untyped-def]
    """The node and those above it up to the first that is not wanted, highest first."""
    found = []
    above: TextNode | None = node
    while above is not None and wanted(above):
        found.append(above)
        above = above.parent
    return found[::-1]


def _append(pool: PagePool, node: TextNode) -> npt.NDArray[np.int32]:
    """Give a new text its sequence, and return the slots of what it reads."""
    assert node.sequence < 0
    assert node.is_fresh or (node.parent is not None and node.parent.sequence >= 0)
    node.sequence = pool.create() if node.is_fresh or node.parent is None else pool.fork(node.parent.sequence)
    return pool.append(node.sequence, len(node.reads)).slots
