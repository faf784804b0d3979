"""Training of the acoustic model: joint CTC and attention loss on length-bucketed batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from shallowfusion.demo.acoustic_model import JointModel, save_acoustic_model
from shallowfusion.demo.synthesis import DEMO_FEATURES, Utterance
from shallowfusion.demo.training_attention import round_up, use_training_attention
from shallowfusion.demo.training_loop import Budget, TrainingState
from shallowfusion.demo.vocabulary import BLANK, END_OF_TEXT, NO_TIMESTAMPS, START_OF_TRANSCRIPT, encode

__all__ = ["AcousticSettings", "Batch", "joint_loss", "make_batch", "pad_features", "train_acoustic"]

# Quiet floor of Whisper's features below their loudest value: 8 decades, divided by 4.
_FLOOR_BELOW_PEAK = 2.0
_IGNORED = -100
# Share of the decoder's history that is replaced by random letters. A decoder that cannot trust its history listens
# instead of guessing: its internal language model stays weak, and a fused one has something to add.
_HISTORY_NOISE = 0.25


@dataclass(frozen=True)
class AcousticSettings:
    """How the acoustic model is trained.

    Args:
        batch_frames: mel frames in a batch, padding not counted.
        ctc_weight: share of the CTC loss in the sum, 0..1.
        full_window_share: share of the batches that are padded to the full 30 s window.
        report_every: updates between two printed lines.
        save_every: updates between two checkpoints.
    """

    batch_frames: int = 7000
    ctc_weight: float = 0.6
    full_window_share: float = 0.08
    report_every: int = 50
    save_every: int = 500


@dataclass(frozen=True)
class Batch:
    """Padded features and targets.

    `features` [utterances, mels, frames]; `prefixes` and `targets` [utterances, tokens], targets -100 where
    nothing is asked; `labels` [all labels] are the CTC targets one after the other, `label_counts` per utterance.
    """

    features: Tensor
    prefixes: Tensor
    targets: Tensor
    labels: Tensor
    label_counts: Tensor


def pad_features(features: list[Tensor], num_frames: int) -> Tensor:
    """Stack [frames, mels] features to [utterances, mels, num_frames], each filled with its own silence."""
    rows = []
    for feature in features:
        silence = float(feature.max()) - _FLOOR_BELOW_PEAK
        rows.append(functional.pad(feature, (0, 0, 0, num_frames - feature.shape[0]), value=silence))
    return torch.stack(rows).transpose(1, 2).contiguous()


def make_batch(utterances: list[Utterance], num_frames: int, generator: random.Random | None) -> Batch:
    """Pad utterances to `num_frames`, mask and tilt the features if a generator is given."""
    features = []
    for utterance in utterances:
        feature = torch.tensor(utterance.features, dtype=torch.float32)
        features.append(feature if generator is None else _disturb(feature, generator))
    ids = [encode(utterance.text) for utterance in utterances]
    num_tokens = round_up(max(map(len, ids)) + 2, 16)
    prefixes = torch.full((len(ids), num_tokens), END_OF_TEXT)
    targets = torch.full((len(ids), num_tokens), _IGNORED)
    for row, numbers in enumerate(ids):
        prefixes[row, : len(numbers) + 2] = torch.tensor([START_OF_TRANSCRIPT, NO_TIMESTAMPS, *numbers])
        targets[row, : len(numbers) + 2] = torch.tensor([NO_TIMESTAMPS, *numbers, END_OF_TEXT])
    return Batch(
        features=pad_features(features, num_frames),
        prefixes=prefixes,
        targets=targets,
        labels=torch.tensor([number for numbers in ids for number in numbers]),
        label_counts=torch.tensor([len(numbers) for numbers in ids]),
    )


def joint_loss(model: JointModel, batch: Batch, ctc_weight: float) -> tuple[Tensor, Tensor]:
    """CTC loss and attention loss per label, the first over the padding too, since inference decodes it.

    Labels are not smoothed: smoothing would put a floor under the probability of an early end of text, and a search
    that sums log probabilities, with a language model's added, would cut long sentences short.

    Returns:
        two scalars: the weighted sum to descend, and [2] the CTC and attention parts, detached.
    """
    with torch.autocast("cpu", torch.bfloat16):
        states = model.encode(batch.features)
        label_logits = model.ctc_head(states)
        prefixes = _with_noise(batch.prefixes) if model.training else batch.prefixes
        token_logits = model.decode(prefixes, states)
    log_probs = label_logits.float().log_softmax(dim=-1).transpose(0, 1)  # [frames, utterances, labels]
    frame_counts = torch.full_like(batch.label_counts, log_probs.shape[0])
    ctc = functional.ctc_loss(
        log_probs, batch.labels, frame_counts, batch.label_counts, blank=BLANK, reduction="sum", zero_infinity=True
    ) / float(batch.label_counts.sum())
    attention = functional.cross_entropy(
        token_logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=_IGNORED
    )
    total = ctc_weight * ctc + (1.0 - ctc_weight) * attention
    return total, torch.stack([ctc.detach(), attention.detach()])


def _with_noise(prefixes: Tensor) -> Tensor:
    """Replace some text tokens by random ones; start tokens and padding stay."""
    is_text = prefixes < END_OF_TEXT
    replaced = is_text & (torch.rand(prefixes.shape) < _HISTORY_NOISE)
    return torch.where(replaced, torch.randint_like(prefixes, END_OF_TEXT), prefixes)


def train_acoustic(
    model: JointModel,
    utterances: list[Utterance],
    budget: Budget,
    settings: AcousticSettings,
    checkpoint: Path,
    seed: int,
) -> JointModel:
    """Train until the budget is spent, going on from `checkpoint` if it exists.

    Beside the checkpoint, `<name>-average/` holds the averaged weights of the last save as a model directory.

    Returns:
        the model with averaged weights.
    """
    usable = [utterance for utterance in utterances if _fits(utterance)]
    print(f"{len(usable)} of {len(utterances)} utterances have room for their characters", flush=True)
    state = TrainingState(model, budget)
    state.restore(checkpoint)
    generator = random.Random(f"{seed}-{state.step}")
    model.train()
    use_training_attention(model.whisper)
    parts = torch.zeros(2)
    while not state.finished:
        for chosen, num_frames in _epoch(usable, settings, generator):
            batch = make_batch(chosen, num_frames, generator)
            loss, batch_parts = joint_loss(model, batch, settings.ctc_weight)
            loss.backward()  # type: ignore[no-untyped-call]
            state.update()
            parts += batch_parts
            if state.step % settings.report_every == 0:
                ctc, attention = (parts / settings.report_every).tolist()
                parts.zero_()
                rate = state.optimizers[0].param_groups[0]["lr"]
                print(
                    f"acoustic step {state.step} after {state.elapsed_seconds:.0f} s: "
                    f"ctc {ctc:.3f}, attention {attention:.3f} nats per character, rate {rate:.2e}",
                    flush=True,
                )
            if state.step % settings.save_every == 0 or state.finished:
                state.save(checkpoint)
                save_acoustic_model(_as_joint(state.average), checkpoint.with_name(checkpoint.stem + "-average"))
            if state.finished:
                break
    return _as_joint(state.average)


def _as_joint(module: torch.nn.Module) -> JointModel:
    assert isinstance(module, JointModel)
    return module


def _fits(utterance: Utterance) -> bool:
    """Whether CTC has a frame for every character, and a blank between doubled ones."""
    text = " " + utterance.text
    doubled = sum(first == second for first, second in itertools.pairwise(text))
    frames = len(utterance.features)
    return len(text) + doubled <= frames // 2 and frames <= DEMO_FEATURES.chunk_frames


def _epoch(
    utterances: list[Utterance], settings: AcousticSettings, generator: random.Random
) -> Iterator[tuple[list[Utterance], int]]:
    """Every utterance once, in batches of alike length; yields them with the even frame count to pad to."""
    order = sorted(range(len(utterances)), key=lambda row: len(utterances[row].features) + generator.random() * 20)
    batches: list[list[int]] = [[]]
    for row in order:
        longest = len(utterances[row].features)
        if batches[-1] and longest * (len(batches[-1]) + 1) > settings.batch_frames:
            batches.append([])
        batches[-1].append(row)
    generator.shuffle(batches)
    for rows in batches:
        chosen = [utterances[row] for row in rows]
        longest = max(len(utterance.features) for utterance in chosen)
        if generator.random() < settings.full_window_share:
            yield chosen[: max(1, settings.batch_frames // DEMO_FEATURES.chunk_frames)], DEMO_FEATURES.chunk_frames
        else:
            extra = 32 if generator.random() < 0.25 else 0
            yield chosen, min(round_up(longest, 32) + extra, DEMO_FEATURES.chunk_frames)


def _disturb(feature: Tensor, generator: random.Random) -> Tensor:
    """Shift and tilt the spectrum a little, then mask bands and stretches of time with the mean."""
    frames, mels = feature.shape
    slope = torch.linspace(-1.0, 1.0, mels) * generator.uniform(-0.12, 0.12)
    feature = feature + slope + generator.uniform(-0.15, 0.15)
    mean = feature.mean()
    for _ in range(2):
        width = generator.randint(0, 8)
        start = generator.randint(0, mels - width)
        feature[:, start : start + width] = mean
    for _ in range(2):
        width = generator.randint(0, min(6, frames // 8))
        start = generator.randint(0, frames - width)
        feature[start : start + width] = mean
    return feature
