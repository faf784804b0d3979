"""Plain texts scored by a causal language model, for instance n-best lists of another recogniser (METHODS 8.1)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.checks import integer
from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.base import CachedScorer, Context
from shallowfusion.scorers.causal_lm import CausalLMScorer

__all__ = ["score_continuations", "score_texts", "score_texts_stepwise"]

logger = logging.getLogger(__name__)

LogProbs = npt.NDArray[np.float32]
Ids = tuple[int, ...]

_HEAD_ROWS = 256


def score_texts(
    scorer: CausalLMScorer,
    texts: Sequence[str | Sequence[int]],
    *,
    prefix: str = " ",
    context: Sequence[int] = (),
    include_end: bool = True,
    batch_tokens: int = 1024,
) -> list[LogProbs]:
    """Log-prob of every token of every text, after the scorer's begin token and `context`.

    Texts that begin alike are read once: a batch is a tree of tokens, each of which sees its own ancestors. The sum
    of a text equals the `lm` part of the same tokens in a search. Texts beyond the model's window are scored by
    `score_texts_stepwise`, which moves the window as a search does.

    Price: one pass per `batch_tokens` distinct tokens; logits of 256 tokens at a time.

    Args:
        texts: texts, or token ids of the scorer. Order does not matter for the price, sharing is found by sorting.
        prefix: put before every text that is not empty; the space that Whisper's transcripts begin with.
        context: ids read, not scored, for instance of the previous segment.
        include_end: whether the end token is scored, as the last of each text; all or none, or totals do not compare.
        batch_tokens: most tokens in a pass; a longer text has a pass of its own.

    Returns:
        One float32 array per text, [tokens] or [tokens + 1] with the end, nats, in the order given.

    Raises:
        InvalidArgumentError: texts for a scorer without tokenizer, or ids outside its vocabulary.
    """
    integer("batch_tokens", batch_tokens, 1, 1_000_000)
    sequences = [_ids_of(scorer, text, prefix) for text in texts]
    prompt = scorer.prompt(context)
    distinct = sorted(set(sequences))
    long = [ids for ids in distinct if len(prompt) + len(ids) > scorer.window]
    found: dict[Ids, LogProbs] = {}
    if long:
        logger.info(
            "%d texts are longer than the window of %d tokens and are read step by step", len(long), scorer.window
        )
        stepwise = score_texts_stepwise(scorer, long, context=context, include_end=include_end)
        found |= zip(long, stepwise, strict=True)
    batch: list[Ids] = []
    tree = _Tree(prompt)
    for ids in (ids for ids in distinct if ids not in found):
        if batch and tree.num_nodes + tree.num_new(ids) > batch_tokens:
            found |= zip(batch, _read(scorer, tree, batch, include_end), strict=True)
            batch, tree = [], _Tree(prompt)
        tree.add(ids)
        batch.append(ids)
    if batch:
        found |= zip(batch, _read(scorer, tree, batch, include_end), strict=True)
    return [found[ids] for ids in sequences]


def score_continuations(
    scorer: CachedScorer,
    encoder_output: Tensor,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[Sequence[int]]],
) -> list[list[LogProbs]]:
    """Log-prob of every token of every text of a batch of utterances under an attention decoder, the end token last.

    Equal to the acoustic parts of the same tokens in a search. Texts of an utterance that begin alike are read once.

    Price: one decoder pass over the distinct tokens of all texts; logits of 256 tokens at a time.

    Args:
        encoder_output: [utterances, frames, size].
        prompts: tokens of each utterance that are read, not scored.
        texts: token ids of the texts of each utterance, without end token; at least one text each.

    Returns:
        Per utterance one float32 array [tokens + 1] per text, nats; -inf all through for a text that does not fit the
        scorer's window.
    """
    trees = [_Tree(prompt) for prompt in prompts]
    fitting: list[list[Ids]] = []
    for tree, own in zip(trees, texts, strict=True):
        fitting.append([tuple(ids) for ids in own if len(tree.prompt) + len(ids) <= scorer.window])
        for ids in fitting[-1]:
            tree.add(ids)
    hidden = scorer.trees_hidden_states([(tree.tokens, tree.parents) for tree in trees], encoder_output)
    answers = []
    for tree, own, known, states in zip(trees, texts, fitting, hidden, strict=True):
        found = dict(zip(known, _asked(scorer, states, tree, known, True), strict=True))
        answers.append([found.get(tuple(ids), np.full(len(ids) + 1, -np.inf, dtype=np.float32)) for ids in own])
    return answers


@torch.inference_mode()
def score_texts_stepwise(
    scorer: CausalLMScorer,
    texts: Sequence[str | Sequence[int]],
    *,
    prefix: str = " ",
    context: Sequence[int] = (),
    include_end: bool = True,
) -> list[LogProbs]:
    """`score_texts` one token of all texts after the other, as a search reads them: the readable twin.

    Price: one pass per token of the longest text, with one row per text.
    """
    sequences = [_ids_of(scorer, text, prefix) for text in texts]
    if not sequences:
        return []
    targets = [[*ids, scorer.vocabulary.end_id] if include_end else list(ids) for ids in sequences]
    longest = max(len(ids) for ids in targets)
    state = scorer.start(Context([scorer.prompt(context)], len(texts), longest))
    state = scorer.fork(state, np.zeros((1, len(texts)), dtype=np.int64))
    logits = state.logits.expand(len(texts), -1)
    found = np.zeros((len(texts), longest), dtype=np.float32)
    for step in range(longest):
        alive = [i for i, ids in enumerate(targets) if step < len(ids)]
        chosen = torch.tensor([targets[i][step] for i in alive], device=logits.device)
        log_probs = torch.log_softmax(logits[alive].float(), dim=1)
        found[alive, step] = log_probs.gather(1, chosen[:, None])[:, 0].cpu().numpy()
        if step + 1 < longest:
            following = [[ids[step] if step + 1 < len(ids) else -1 for ids in targets]]
            logits, state = scorer.score(state, np.array(following, dtype=np.int64))
    return [found[i, : len(ids)].copy() for i, ids in enumerate(targets)]


@dataclass
class _Tree:
    """Token sequences that share their beginnings; the prompt is the trunk.

    Args:
        tokens, parents: of each node, a parent always before its children; the first node has parent -1.
    """

    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, token in enumerate(self.prompt):
            self.tokens.append(token)
            self.parents.append(i - 1)

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)

    def num_new(self, ids: Ids) -> int:
        """Nodes that adding a sequence would make."""
        return len(ids) - self._shared(ids)[1]

    def add(self, ids: Ids) -> None:
        node, depth = self._shared(ids)
        for token in ids[depth:]:
            self._children[node, token] = self.num_nodes
            self.tokens.append(token)
            self.parents.append(node)
            node = self.num_nodes - 1

    def path(self, ids: Ids) -> list[int]:
        """The nodes whose logits score the tokens of a sequence and what follows it, from the end of the prompt on."""
        nodes = [len(self.prompt) - 1]
        for token in ids:
            nodes.append(self._children[nodes[-1], token])
        return nodes

    def _shared(self, ids: Ids) -> tuple[int, int]:
        """The last node a sequence has in common with the tree, and its depth below the prompt."""
        node = len(self.prompt) - 1
        for depth, token in enumerate(ids):
            child = self._children.get((node, token))
            if child is None:
                return node, depth
            node = child
        return node, len(ids)


def _read(scorer: CausalLMScorer, tree: _Tree, batch: Sequence[Ids], include_end: bool) -> list[LogProbs]:
    """One pass over a tree, then the log-probs each sequence asks of its nodes."""
    return _asked(scorer, scorer.tree_hidden_states(tree.tokens, tree.parents), tree, batch, include_end)


@torch.inference_mode()
def _asked(
    scorer: CachedScorer, hidden: Tensor, tree: _Tree, batch: Sequence[Ids], include_end: bool
) -> list[LogProbs]:
    end = (scorer.vocabulary.end_id,) if include_end else ()
    wanted = [(node, token) for ids in batch for node, token in zip(tree.path(ids), (*ids, *end), strict=False)]
    places = {pair: i for i, pair in enumerate(dict.fromkeys(sorted(wanted)))}
    scores = _log_probs(scorer, hidden, list(places))
    found, start = [], 0
    for ids in batch:
        stop = start + len(ids) + len(end)
        found.append(scores[[places[pair] for pair in wanted[start:stop]]])
        start = stop
    return found


def _log_probs(scorer: CachedScorer, hidden: Tensor, pairs: Sequence[tuple[int, int]]) -> LogProbs:
    """Log-prob of each (node, token), pairs sorted by node; few rows of logits exist at a time."""
    found = np.zeros(len(pairs), dtype=np.float32)
    nodes = sorted({node for node, _ in pairs})
    first = 0
    for start in range(0, len(nodes), _HEAD_ROWS):
        rows = nodes[start : start + _HEAD_ROWS]
        logits = scorer.head(hidden[rows]).float()
        row_of = {node: row for row, node in enumerate(rows)}
        last = first
        while last < len(pairs) and pairs[last][0] in row_of:
            last += 1
        own = torch.tensor([row_of[node] for node, _ in pairs[first:last]], device=logits.device)
        tokens = torch.tensor([token for _, token in pairs[first:last]], device=logits.device)
        found[first:last] = (logits[own, tokens] - logits.logsumexp(dim=1)[own]).cpu().numpy()
        first = last
    return found


def _ids_of(scorer: CausalLMScorer, text: str | Sequence[int], prefix: str) -> Ids:
    if isinstance(text, str):
        if scorer.tokenizer is None:
            raise InvalidArgumentError(
                f"the scorer {scorer.vocabulary.name} was made without a tokenizer; load it with load_causal_lm, or "
                "give token ids."
            )
        return tuple(scorer.tokenizer.encode(prefix + text, add_special_tokens=False)) if text else ()
    size = len(scorer.vocabulary)
    ids = tuple(integer("a token id", token, 0, size - 1) for token in text)
    require(scorer.vocabulary.end_id not in ids, "a text cannot hold the end token; include_end=True scores it.")
    return ids
