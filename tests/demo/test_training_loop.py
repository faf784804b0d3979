"""Learning rate, averaging, checkpoints, and the attention used in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shallowfusion.demo.acoustic_model import new_acoustic_model
from shallowfusion.demo.lm_training import new_lm
from shallowfusion.demo.training_attention import round_up, use_training_attention
from shallowfusion.demo.training_loop import Budget, TrainingState
from shallowfusion.errors import InvalidArgumentError


def test_rate_climbs_stays_and_falls_to_zero() -> None:
    budget = Budget(steps=100, peak_rate=1.0, warmup_steps=10, decay_start=0.5)
    assert budget.rate(0, 0.0) == pytest.approx(0.1)
    assert budget.rate(30, 0.0) == pytest.approx(1.0)
    assert budget.rate(75, 0.0) == pytest.approx(0.5)
    assert budget.rate(100, 0.0) == pytest.approx(0.0, abs=1e-12)


def test_the_nearer_of_steps_and_minutes_counts() -> None:
    budget = Budget(steps=100, peak_rate=1.0, minutes=2.0)
    assert budget.progress(50, 30.0) == pytest.approx(0.5)
    assert budget.progress(50, 90.0) == pytest.approx(0.75)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"minutes": 0.0}, {"decay_start": 1.0}])
def test_bad_budgets_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        Budget(**{"steps": 10, "peak_rate": 1.0, **wrong})  # type: ignore[arg-type]


def descend(state: TrainingState, num_steps: int) -> None:
    tokens = torch.arange(12).view(2, 6)
    for _ in range(num_steps):
        logits = state.model(input_ids=tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        state.update()


def test_a_restored_state_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    budget = Budget(steps=20, peak_rate=1e-2)
    torch.manual_seed(5)
    whole = TrainingState(new_lm(width=40, layers=1), budget)
    start = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    descend(whole, 3)
    whole.save(tmp_path / "state.pt")
    descend(whole, 3)

    resumed = TrainingState(new_lm(width=40, layers=1), budget)
    assert not resumed.restore(tmp_path / "absent.pt")
    assert resumed.restore(tmp_path / "state.pt")
    descend(resumed, 3)
    assert resumed.step == whole.step == 6
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor)
        torch.testing.assert_close(resumed.average.state_dict()[name], whole.average.state_dict()[name])
    moved = [name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, start[name])]
    assert len(moved) > len(start) // 2


def test_training_attention_equals_the_usual_one() -> None:
    torch.manual_seed(6)
    asr, lm = new_acoustic_model(64, 1, 1).eval(), new_lm(width=40, layers=1).eval()
    features, tokens = torch.randn(2, 80, 64), torch.randint(0, 28, (2, 9))

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return asr.decode(tokens, asr.encode(features)), lm(input_ids=tokens, use_cache=False).logits

    usual = outputs()
    use_training_attention(asr.whisper)
    use_training_attention(lm)
    for ours, theirs in zip(outputs(), usual, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_round_up() -> None:
    assert [round_up(count, 16) for count in (0, 1, 16, 17)] == [0, 16, 16, 32]
