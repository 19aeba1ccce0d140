"""A loss that is not finite moves no bit of theta, and is reported as asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoext

BAD = [float("nan"), float("inf"), -float("inf")]


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).to(dtype)
    with torch.no_grad():
        model.weight[0, :3] = torch.tensor([-0.0, 0.0, float("nan")])
    return model


def bits(model: nn.Module) -> list[bytes]:
    return [
        parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for parameter in model.parameters()
    ]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("as_float", [False, True])
def test_theta_stays(bad: float, dtype: torch.dtype, when: int, as_float: bool) -> None:
    model = model_of(dtype)
    before = bits(model)
    calls = 0

    def closure() -> torch.Tensor | float:
        nonlocal calls
        calls += 1
        model(torch.ones(6, dtype=dtype))
        value = bad if (calls - 1) % 2 == when else 1.0
        return value if as_float else torch.tensor(value)

    optimizer = zoext.MeZO(model, lr=10.0, weight_decay=0.5, nonfinite="skip")
    for step in range(3):
        optimizer.step(closure)
        assert optimizer.nonfinite_steps == step + 1
        assert optimizer.param_groups[0]["step"] == step + 1
        assert not optimizer.last_estimate.finite
        assert optimizer.last_estimate.coefficients.item() == 0
        assert bits(model) == before

    raising = zoext.MeZO(model, lr=10.0, weight_decay=0.5)
    with pytest.raises(FloatingPointError, match="not finite"):
        raising.step(closure)
    assert bits(model) == before
    assert raising.param_groups[0]["step"] == 0
    with pytest.raises(RuntimeError, match="nothing to apply"):
        raising.step()


def test_a_quotient_that_overflows_counts_as_not_finite() -> None:
    model = nn.Linear(2, 2)
    losses = iter([3e38, -3e38])
    optimizer = zoext.MeZO(model, mu=1e-3, nonfinite="skip")
    before = bits(model)
    optimizer.step(lambda: model(torch.ones(2)).sum() * 0 + next(losses))
    assert bits(model) == before
    assert optimizer.nonfinite_steps == 1


def test_other_samples_still_count() -> None:
    model = nn.Linear(3, 2)
    losses = iter([1.0, 0.5, float("nan"), 1.0, 2.0, 1.0])
    optimizer = zoext.MeZO(model, mu=0.5, samples=3, nonfinite="skip", weight_decay=0.1, lr=0.25)
    before = model.weight.detach().clone()
    optimizer.step(lambda: float(model(torch.ones(3)).sum()) * 0 + next(losses))
    assert optimizer.last_estimate.coefficients.tolist() == pytest.approx([0.5 / 3, 0.0, 1.0 / 3])
    seeds = [zoext.noise.step_seed(0, 0, draw) for draw in range(3)]
    z = [zoext.noise.normal((2, 3), seed=seed) for seed in seeds]
    expected = before - 0.25 * (0.5 / 3 * z[0] + 1.0 / 3 * z[2])  # no decay in such a step
    assert torch.allclose(model.weight, expected, rtol=0, atol=1e-6)
