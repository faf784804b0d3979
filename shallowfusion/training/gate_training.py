"""Training of learned gates on what the models say of reference texts, finished on n-best lists (METHODS 11.3, 8.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.evaluation.alignment import align
from shallowfusion.fusion.gates import Form
from shallowfusion.fusion.learned_gate import GateNetwork, GateSettings
from shallowfusion.training.teacher_forcing import ForcedText, Trace, joined_traces

__all__ = [
    "GateOutcome",
    "GateTraining",
    "TracedList",
    "best_constant",
    "corrupted_text",
    "fused_log_probs",
    "mwer_coefficients",
    "path_total",
    "train_gate",
]

_UNLIKELY = -1e3  # in place of -inf, so that a weight times it stays finite
_HIGHEST_CONSTANT = 4.0


@dataclass(frozen=True)
class GateTraining:
    """How a gate is trained.

    Args:
        epochs: passes over all tokens.
        batch_tokens: tokens of one update.
        learning_rate: of Adam; a tenth of it in the finish on lists.
        weight_cost: times the mean squared weight, added to the loss: reference texts make the LM look better than
            it is behind a recogniser's own words.
        check_every: epochs between counts of development errors; `patience` counts without fewer errors end it.
        list_epochs: passes over n-best lists at the end, minimising expected word errors; 0 = none.
        form: in which the gate will decode: lists are ranked by totals of that form (see `gates`).
    """

    epochs: int = 60
    batch_tokens: int = 512
    learning_rate: float = 3e-3
    weight_cost: float = 0.01
    check_every: int = 10
    patience: int = 3
    list_epochs: int = 0
    seed: int = 0
    form: Form = "local"

    def __post_init__(self) -> None:
        for name, lowest in (
            ("epochs", 1),
            ("batch_tokens", 1),
            ("check_every", 1),
            ("patience", 1),
            ("list_epochs", 0),
        ):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= lowest, f"{name} must be an integer >= {lowest}, got {value!r}."
            )
        for name in ("learning_rate", "weight_cost"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name} must be finite and >= 0, got {value!r}.")


@dataclass(frozen=True)
class TracedList:
    """An n-best list as the models said it: one trace per hypothesis, with its word errors."""

    traces: tuple[Trace, ...]
    errors: tuple[int, ...]


@dataclass(frozen=True)
class GateOutcome:
    """A trained gate.

    Args:
        network: of the count with the fewest development errors, or the last where none were counted.
        losses: mean loss in nats per token by epoch, the cost of weights included.
        dev_errors: (epoch, errors) in the order counted; epoch 0 is the untrained gate.
    """

    network: GateNetwork
    losses: tuple[float, ...]
    dev_errors: tuple[tuple[int, int], ...]


def fused_log_probs(weights: Tensor, trace: Trace) -> Tensor:
    """log q(target), q = softmax(asr + sum_k weights[k] * lm_k) over the vocabulary, [tokens].

    Tokens outside the listed ones count as equally likely among themselves, in each model.

    Args:
        weights: [tokens, models]; sources past the models are left out.
    """
    used = slice(0, 1 + weights.shape[1])
    factors = torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1)  # [tokens, sources]
    listed = (trace.log_probs[:, :, used].clamp_min(_UNLIKELY) * factors[:, None]).sum(dim=2)
    listed = listed.masked_fill(trace.ids < 0, float("-inf"))
    count = trace.num_rest.clamp_min(1).to(weights.dtype).log()
    each = (trace.rest[:, used].clamp_min(_UNLIKELY) - count[:, None]).mul(factors).sum(dim=1)
    rest = (count + each).masked_fill(trace.num_rest == 0, float("-inf"))
    gold = (trace.gold[:, used].clamp_min(_UNLIKELY) * factors).sum(dim=1)
    return gold - torch.cat([listed, rest[:, None]], dim=1).logsumexp(dim=1)


def path_total(weights: Tensor, trace: Trace, form: Form = "local") -> Tensor:
    """What a search in this form adds to a hypothesis for all its tokens; a number."""
    if form == "local":
        return fused_log_probs(weights, trace).sum()
    models = weights.shape[1]
    said = trace.gold[:, 1 : 1 + models].clamp_min(_UNLIKELY)
    if form == "advantage":
        said = said - torch.stack([own.max_log_prob for own in trace.statistics[1 : 1 + models]], dim=1)
    return trace.gold[:, 0].clamp_min(_UNLIKELY).sum() + (weights * said).sum()


def best_constant(trace: Trace, num_models: int = 1, steps: int = 200) -> tuple[float, float]:
    """The one weight for all language models and tokens with the least loss, and that loss in nats per token.

    The loss is convex in the weight; golden section from 0 to 4.
    """

    def loss(weight: float) -> float:
        return -float(fused_log_probs(torch.full((len(trace), num_models), weight), trace).mean())

    shrink = (math.sqrt(5) - 1) / 2
    low, high = 0.0, _HIGHEST_CONSTANT
    for _ in range(min(steps, 60)):
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    weight = (low + high) / 2
    return weight, loss(weight)


def corrupted_text(reference: Sequence[int], heard: Sequence[int], end_id: int) -> ForcedText:
    """What a recogniser heard as prefix, and after each of its tokens what would be right next.

    The right token is the next one of the reference in the alignment of the two; behind all of them, the end.
    """
    targets: dict[int, int] = {}
    for step in align([str(token) for token in reference], [str(token) for token in heard]):
        right = reference[step.reference] if step.reference < len(reference) else end_id
        targets.setdefault(step.hypothesis, right)
    return ForcedText(tuple(heard), tuple(targets.get(place, end_id) for place in range(len(heard) + 1)))


def mwer_coefficients(scores: Tensor, errors: Tensor) -> Tensor:
    """Gradient of expected errors sum_i q_i * errors_i by the scores, q = softmax(scores): q_i * (errors_i - mean)."""
    shares = torch.softmax(scores, dim=0)
    return shares * (errors - (shares * errors).sum())


def train_gate(
    traces: Sequence[Trace],
    settings: GateSettings,
    training: GateTraining,
    dev_errors: Callable[[GateNetwork], int] | None = None,
    lists: Sequence[TracedList] = (),
) -> GateOutcome:
    """Minimise -log q(target) + weight_cost * weight**2 over tokens, then, if asked for, expected errors of the lists.

    Args:
        traces: of reference texts, and of what was heard with the right tokens.
        dev_errors: counts word errors of a gate by decoding; the gate with the fewest is kept.
        lists: for the finish, scores being `path_total`.

    Raises:
        InvalidArgumentError: no traces, or a finish without lists.
    """
    require(bool(traces), "train_gate needs at least one trace, got none.")
    require(
        training.list_epochs == 0 or bool(lists),
        f"list_epochs={training.list_epochs} needs n-best lists of several hypotheses, got none.",
    )
    torch.manual_seed(training.seed)
    data = joined_traces(traces)
    network = GateNetwork(settings)
    network.standardise(data.features)
    watch = _Watch(network, training, dev_errors)
    losses: list[float] = []
    optimiser = torch.optim.Adam(network.parameters(), lr=training.learning_rate)
    generator = torch.Generator().manual_seed(training.seed)
    for epoch in range(1, training.epochs + 1):
        losses.append(_epoch(network, data, optimiser, training, generator))
        if watch.is_over(epoch):
            break
    if training.list_epochs:
        watch.restore()
        optimiser = torch.optim.Adam(network.parameters(), lr=training.learning_rate / 10)
        for epoch in range(1, training.list_epochs + 1):
            _list_epoch(network, lists, optimiser, training.form)
            watch.count(len(losses) + epoch)
    watch.restore()
    return GateOutcome(network.eval(), tuple(losses), tuple(watch.counts))


@dataclass
class _Watch:
    """Keeps the gate with the fewest development errors."""

    network: GateNetwork
    training: GateTraining
    dev_errors: Callable[[GateNetwork], int] | None
    counts: list[tuple[int, int]] = field(default_factory=list)
    best: tuple[int, dict[str, Tensor]] | None = None
    waited: int = 0

    def __post_init__(self) -> None:
        self.count(0)

    def count(self, epoch: int) -> None:
        if self.dev_errors is None:
            return
        errors = self.dev_errors(self.network)
        self.counts.append((epoch, errors))
        # An untrained gate is where training starts from; with as many errors the trained one is kept.
        if self.best is None or errors < self.best[0] or (errors == self.best[0] and self.counts[-2][0] == 0):
            self.best, self.waited = (errors, copy.deepcopy(self.network.state_dict())), 0
        else:
            self.waited += 1

    def is_over(self, epoch: int) -> bool:
        if self.dev_errors is None or epoch % self.training.check_every:
            return False
        self.count(epoch)
        return self.waited >= self.training.patience

    def restore(self) -> None:
        if self.best is not None:
            self.network.load_state_dict(self.best[1])


def _epoch(
    network: GateNetwork,
    data: Trace,
    optimiser: torch.optim.Optimizer,
    training: GateTraining,
    generator: torch.Generator,
) -> float:
    """One pass over all tokens in random order; the mean loss."""
    network.train()
    order = torch.randperm(len(data), generator=generator)
    total = 0.0
    for chosen in torch.split(order, training.batch_tokens):
        batch = _chosen(data, chosen)
        weights = network.settings.largest_weight * network(batch.features)
        loss = -fused_log_probs(weights, batch).mean() + training.weight_cost * weights.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item() * len(chosen)
    network.eval()
    return total / len(data)


def _list_epoch(
    network: GateNetwork, lists: Sequence[TracedList], optimiser: torch.optim.Optimizer, form: Form
) -> None:
    """One pass over the lists with the closed-form gradient of the expected word errors."""
    network.train()
    for own in lists:
        scores = []
        for trace in own.traces:
            weights = network.settings.largest_weight * network(trace.features)
            scores.append(path_total(weights, trace, form))
        stacked = torch.stack(scores)
        errors = torch.tensor(own.errors, dtype=stacked.dtype)
        optimiser.zero_grad()
        torch.autograd.backward(stacked, mwer_coefficients(stacked.detach(), errors))
        optimiser.step()
    network.eval()


def _chosen(data: Trace, rows: Tensor) -> Trace:
    """Some tokens of a trace, without the statistics, which training does not look at."""
    return Trace(
        data.targets[rows], data.gold[rows], data.features[rows], (), data.ids[rows], data.log_probs[rows],
        data.rest[rows], data.num_rest[rows],
    )  # fmt: skip
