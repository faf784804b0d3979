"""What every source says of a given text, token by token: the models read it instead of their own choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.decoder import FusionDecoder
from shallowfusion.fusion.gates import StepView
from shallowfusion.fusion.learned_gate import gate_features
from shallowfusion.fusion.step import row_statistics
from shallowfusion.options import DecodingOptions
from shallowfusion.search.sources import Sources
from shallowfusion.values import RowStatistics, Unmapped

__all__ = [
    "ForcedText",
    "Trace",
    "force",
    "forced_steps",
    "joined_traces",
    "mapped_log_probs",
    "text_ids",
    "trace_rows",
]

TOP_K = 64


@dataclass(frozen=True)
class ForcedText:
    """A text to be read by the models.

    Args:
        prefix: acoustic ids the models read, without the forced tokens and without the end.
        targets: the right token after each prefix, one more than `prefix`; the last may be the end token.
    """

    prefix: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def of(cls, token_ids: Sequence[int], end_id: int) -> ForcedText:
        """A text with its own tokens as targets, then the end."""
        return cls(tuple(token_ids), (*token_ids, end_id))


@dataclass(frozen=True)
class Trace:
    """What the sources say at each of `tokens` steps; the sources are the acoustic model, then the language models.

    Args:
        targets: int64 [tokens].
        gold: float32 [tokens, sources], log-prob of the target as the search charges it.
        features: float32 [tokens, features], see `gate_features`.
        statistics: per source entropies, largest log-probs and so on, float32 [tokens] each.
        ids: int64 [tokens, candidates], the 64 best tokens of every source and the target, each once; -1 = none.
        log_probs: float32 [tokens, candidates, sources]; -inf beside an id of -1.
        rest: float32 [tokens, sources], log of the mass outside `ids`.
        num_rest: int64 [tokens], tokens outside `ids`.
    """

    targets: Tensor
    gold: Tensor
    features: Tensor
    statistics: tuple[RowStatistics, ...]
    ids: Tensor
    log_probs: Tensor
    rest: Tensor
    num_rest: Tensor

    def __len__(self) -> int:
        return len(self.targets)


def text_ids(decoder: FusionDecoder, text: str) -> tuple[int, ...]:
    """Acoustic ids of a transcript, with the leading space that Whisper's transcripts begin with.

    Raises:
        InvalidArgumentError: the text holds no token.
    """
    ids = tuple(decoder.acoustic.tokenizer.encode(" " + text.strip(), add_special_tokens=False))
    require(bool(ids and text.strip()), f"the text {text!r} holds no tokens of {decoder.acoustic.name}.")
    return ids


def forced_steps(sources: Sources, prefixes: Sequence[Sequence[int]]) -> Iterator[tuple[StepView, list[int]]]:
    """Read a prefix per utterance, one token a step, through the scorers of a search with one row per utterance.

    Price: one pass of every scorer per token of the longest prefix.

    Yields:
        The step's view, one row per utterance, and the utterances whose prefix reaches this far; other rows hold
        what was said of an earlier step. `view.sums` holds each source's log-prob of the tokens so far.
    """
    plan, count = sources.plan, len(prefixes)
    states = [scorer.start(context) for scorer, context in zip(sources.scorers, sources.contexts, strict=True)]
    nowhere = np.zeros((count, 1), dtype=np.int64)
    sums = torch.zeros((count, len(states)))
    temperatures = plan.temperatures or (1.0,) * len(states)
    for step in range(1 + max(len(prefix) for prefix in prefixes)):
        logits = [state.logits for state in states]
        maps = [None if given is None else given.to(logits[0].device) for given in plan.maps]
        reached = [i for i, prefix in enumerate(prefixes) if step <= len(prefix)]
        view = StepView(logits, temperatures, step, maps, sums.to(logits[0].device), 1)
        yield view, reached
        following = np.array([prefix[step] if step < len(prefix) else -1 for prefix in prefixes], dtype=np.int64)
        if (following < 0).all():
            return
        sums = sums + _said(view, plan.unmapped, torch.from_numpy(following))
        for i, scorer in enumerate(sources.scorers):
            states[i] = scorer.fork(states[i], nowhere)
            _, states[i] = scorer.score(states[i], _own_ids(following, maps[i], logits[i].shape[1])[:, None])


@torch.inference_mode()
def force(
    decoder: FusionDecoder,
    encoder_output: Tensor,
    texts: Sequence[ForcedText],
    options: DecodingOptions,
    top_k: int = TOP_K,
) -> list[Trace]:
    """Read one text per utterance and keep what every source says of it.

    The maps, end policy and temperatures are those a search under `options` would use. An internal LM that the rule
    subtracts is a source like the others, and comes last; features are made without it.

    Price: one pass of every model per token of the longest text; kept are 3 * top_k numbers per token and source.

    Args:
        encoder_output: [utterances, frames, size].

    Raises:
        InvalidArgumentError: texts and utterances do not pair, or a text is longer than the model's window.
    """
    require(
        len(texts) == len(encoder_output) > 0,
        f"texts and utterances must pair up, got {len(texts)} and {len(encoder_output)}.",
    )
    sources = decoder.sources(encoder_output, options)
    room = decoder.acoustic.scorer.window - max(len(prompt) for prompt in sources.contexts[0].prompts)
    longest = max(len(text.prefix) for text in texts)
    require(longest < room, f"a text has {longest} tokens, but the model has room for {room - 1}; cut the recording.")
    num_models = len(sources.scorers) - 1 - int(sources.plan.rule.ilm_weight > 0)
    rows: list[list[Trace]] = [[] for _ in texts]
    for view, reached in forced_steps(sources, [text.prefix for text in texts]):
        targets = torch.tensor([text.targets[min(view.step, len(text.prefix))] for text in texts])
        found = trace_rows(view, targets.to(view.logits[0].device), sources.plan.unmapped, num_models, top_k)
        for i in reached:
            rows[i].append(_row(found, i))
    return [joined_traces(own) for own in rows]


def mapped_log_probs(view: StepView, source: int, unmapped: Sequence[Unmapped]) -> Tensor:
    """Log-probs of a source by acoustic id, [rows, vocab], float32, as the fused step charges them."""
    logits = view.logits[source].float() / view.temperatures[source]
    log_probs = torch.log_softmax(logits, dim=1)
    vocab = view.logits[0].shape[1]
    mapping = None if view.maps is None else view.maps[source]
    if source == 0 or (mapping is None and log_probs.shape[1] == vocab):
        return log_probs
    if mapping is None:
        ids = torch.arange(vocab, device=log_probs.device)
        mapping = torch.where(ids < log_probs.shape[1], ids, -1)
    own = log_probs[:, mapping.clamp_min(0).long()]
    policy = unmapped[source]
    match policy.policy:
        case "neutral":
            charged = log_probs.amax(dim=1, keepdim=True)
        case "floor":
            charged = torch.full_like(own[:, :1], policy.floor)
        case _:
            charged = torch.full_like(own[:, :1], float("-inf"))
    return torch.where(mapping[None] >= 0, own, charged)


def trace_rows(view: StepView, targets: Tensor, unmapped: Sequence[Unmapped], num_models: int, top_k: int) -> Trace:
    """What the sources of a step say in each of its rows; the first axis is the row.

    Args:
        targets: int64 [rows], acoustic ids.
        num_models: language models among the sources; a further one, an internal LM, is left out of the features.
    """
    log_probs = torch.stack([mapped_log_probs(view, s, unmapped) for s in range(len(view.logits))], dim=2)
    rows, vocab, count = log_probs.shape
    best = log_probs.topk(min(top_k, vocab), dim=1).indices.flatten(1)
    listed = torch.cat([targets[:, None], best], dim=1).sort(dim=1).values
    repeated = torch.cat([torch.zeros_like(listed[:, :1], dtype=torch.bool), listed[:, 1:] == listed[:, :-1]], dim=1)
    ids = listed.masked_fill(repeated, -1)
    chosen = log_probs.gather(1, listed[:, :, None].expand(-1, -1, count))
    chosen = chosen.masked_fill(repeated[:, :, None], float("-inf"))
    outside = torch.ones((rows, vocab), dtype=torch.bool, device=ids.device).scatter(1, listed, False)
    rest = log_probs.masked_fill(~outside[:, :, None], float("-inf")).logsumexp(dim=1)
    own = slice(0, 1 + num_models)
    plain = StepView(view.logits[own], view.temperatures[own], view.step, None if view.maps is None else view.maps[own])
    statistics = [row_statistics(source, t) for source, t in zip(view.logits, view.temperatures, strict=True)]
    return Trace(
        targets=targets.cpu(),
        gold=log_probs.gather(1, targets[:, None, None].expand(-1, -1, count))[:, 0].cpu(),
        features=gate_features(plain).cpu(),
        statistics=tuple(RowStatistics(*(field.cpu() for field in vars(own).values())) for own in statistics),
        ids=ids.cpu(),
        log_probs=chosen.cpu(),
        rest=rest.cpu(),
        num_rest=outside.sum(dim=1).cpu(),
    )


def _row(found: Trace, row: int) -> Trace:
    one = slice(row, row + 1)
    statistics = tuple(RowStatistics(*(field[one] for field in vars(own).values())) for own in found.statistics)
    return Trace(
        found.targets[one], found.gold[one], found.features[one], statistics, found.ids[one], found.log_probs[one],
        found.rest[one], found.num_rest[one],
    )  # fmt: skip


def joined_traces(rows: Sequence[Trace]) -> Trace:
    """Traces of several steps or texts one after the other."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows])

    def statistics(source: int) -> RowStatistics:
        columns = zip(*(vars(row.statistics[source]).values() for row in rows), strict=True)
        return RowStatistics(*(torch.cat(column) for column in columns))

    return Trace(
        joined("targets"), joined("gold"), joined("features"), tuple(map(statistics, range(len(rows[0].statistics)))),
        joined("ids"), joined("log_probs"),
        joined("rest"), joined("num_rest"),
    )  # fmt: skip


def _said(view: StepView, unmapped: Sequence[Unmapped], tokens: Tensor) -> Tensor:
    """Each source's log-prob of the tokens, float32 [rows, sources]; 0 where the token is -1."""
    own = tokens.clamp_min(0).to(view.logits[0].device)[:, None]
    found = [mapped_log_probs(view, s, unmapped).gather(1, own)[:, 0] for s in range(len(view.logits))]
    said = torch.stack(found, dim=1).cpu()
    return torch.where(tokens[:, None] >= 0, said, torch.zeros_like(said))


def _own_ids(tokens: np.ndarray, mapping: Tensor | None, size: int) -> np.ndarray:
    """Acoustic ids as ids of a source; -1 where there is no token or no counterpart."""
    if mapping is None:
        return np.where(tokens < size, tokens, -1)
    own = mapping.cpu().numpy().astype(np.int64)[np.maximum(tokens, 0)]
    return np.where(tokens >= 0, own, -1)
