"""After `step`, theta is the paper's formula computed from `zoext.noise.normal`, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoext

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEED, LR, MU = 2**63 + 11, 0.03, 0.05


def directions(model: nn.Module, step: int, draw: int, signs: bool = False) -> list[Tensor]:
    """One direction for every parameter; keys count frozen parameters too."""
    seed = zoext.noise.step_seed(SEED, step, draw)
    z = []
    for key, parameter in enumerate(model.parameters()):
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        if signs:
            flat = zoext._C.signs(seed, key=key, count=parameter.numel())
            z.append(torch.from_numpy(flat).reshape(parameter.shape).to(wide))
        else:
            z.append(zoext.noise.normal(parameter.shape, seed=seed, key=key).to(wide))
    return z


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 9), nn.LayerNorm(9), nn.Linear(9, 3))
    model[2].bias.requires_grad_(False)
    return model.to(dtype)


def chained(terms: list[tuple[Tensor, Tensor]], decay: Tensor | None, theta: Tensor) -> Tensor:
    """theta + (sum of c z - decay theta), as a chain of fused multiply-adds in theta's arithmetic."""
    wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
    # Long double has 64 bits of mantissa: the product of two float32 is exact in it, and rounding the
    # sum to it first changes the float32 result with probability 2**-40 an element.
    number = np.longdouble
    single = np.float64 if wide == torch.float64 else np.float32
    total = np.full(theta.shape, -0.0, dtype=single)
    for coefficient, z in terms:
        total = (number(coefficient.item()) * z.numpy().astype(number) + total.astype(number)).astype(single)
    value = theta.detach().to(wide)
    if decay is not None:
        moved = -number(decay.item()) * value.numpy().astype(number) + total.astype(number)
        total = moved.astype(single)
    return (value + torch.from_numpy(total)).to(theta.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mezo_with_one_direction(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    x = torch.randn(8, 5, dtype=dtype)
    optimizer = zoext.MeZO(model, lr=LR, mu=MU, seed=SEED, precision="nearest")
    for step in range(3):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        z = directions(model, step, 0)
        optimizer.step(lambda: model(x).float().square().mean())
        assert optimizer.last_estimate is not None
        coefficient = optimizer.last_estimate.coefficients
        assert coefficient.abs() > 1e-3
        for old, noise, parameter in zip(before, z, model.parameters(), strict=True):
            if parameter.requires_grad:
                wide = old.to(noise.dtype) + (coefficient * -LR).to(noise.dtype) * noise
                assert torch.equal(parameter, wide.to(dtype))
                assert not torch.equal(parameter, old)
            else:
                assert torch.equal(parameter, old)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_probes_differ_by_rounding_only(dtype: torch.dtype) -> None:
    models = model_of(dtype), model_of(dtype)
    x = torch.randn(8, 5, dtype=dtype)
    for model, probe in zip(models, ("streamed", "inplace"), strict=True):
        optimizer = zoext.MeZO(model, lr=LR, mu=MU, seed=SEED, probe=probe)
        optimizer.step(lambda model=model: model(x).float().square().mean())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
def test_samples_and_weight_decay(dtype: torch.dtype, direction: str) -> None:
    model = model_of(dtype)
    x = torch.randn(8, 5, dtype=dtype)
    kind = zoext.Gaussian() if direction == "gaussian" else zoext.Rademacher()
    estimator = zoext.ForwardDifference(samples=3)
    optimizer = zoext.ZerothOrderOptimizer(
        model,
        direction=kind,
        estimator=estimator,
        lr=LR,
        mu=MU,
        seed=SEED,
        weight_decay=0.7,
        precision="nearest",
    )
    for step in range(2):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step(lambda: model(x).float().square().mean())
        estimate = optimizer.last_estimate
        assert estimate is not None
        assert estimate.forwards == 4
        z = [directions(model, step, draw, signs=direction == "rademacher") for draw in range(3)]
        decay = torch.tensor(LR * 0.7)
        for place, (old, parameter) in enumerate(zip(before, model.parameters(), strict=True)):
            if parameter.requires_grad:
                steps = estimate.coefficients * -LR
                terms = [(steps[draw], z[draw][place]) for draw in range(3)]
                assert torch.equal(parameter, chained(terms, decay, old))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 3])
def test_coefficients_are_difference_quotients(dtype: torch.dtype, samples: int) -> None:
    model = model_of(dtype)
    x = torch.randn(8, 5, dtype=dtype)

    def loss_at(z: list[Tensor], scale: float) -> float:
        moved = model_of(dtype)
        with torch.no_grad():
            for parameter, noise in zip(moved.parameters(), z, strict=True):
                if parameter.requires_grad:
                    parameter.add_(noise * scale)
            return moved(x).square().mean().item()

    z = [directions(model, 0, draw) for draw in range(samples)]
    tolerance = {"rtol": 2e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-6, "atol": 1e-7}
    for estimator in (zoext.CentralDifference(samples=samples), zoext.ForwardDifference(samples=samples)):
        optimizer = zoext.ZerothOrderOptimizer(model, estimator=estimator, mu=MU, seed=SEED)
        estimate = optimizer.estimate(lambda: model(x).square().mean())
        central = isinstance(estimator, zoext.CentralDifference)
        low = -MU if central else 0.0
        plus = [loss_at(noise, MU) for noise in z]
        minus = [loss_at(noise, low) for noise in z]
        slopes = torch.tensor([(a - b) / (MU - low) / samples for a, b in zip(plus, minus, strict=True)])
        assert torch.allclose(estimate.coefficients, slopes, **tolerance)
        losses = plus + (minus if central else minus[:1])
        assert estimate.forwards == len(losses)
        assert estimate.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_groups_with_mu_of_their_own_estimate_the_same_gradient() -> None:
    """On a linear loss each group's expected coefficient times its direction is its gradient."""
    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))
    gradient = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2.0, 1.0, -1.0])
    groups = [{"params": [first], "mu": 0.01}, {"params": [second], "mu": 0.04, "lr": 0.2}]
    optimizer = zoext.MeZO(groups, lr=0.1, seed=SEED)
    optimizer.step(lambda: first @ gradient[0] + second @ gradient[1])
    seed = zoext.noise.step_seed(SEED, 0)
    z = zoext.noise.normal(4, seed=seed, key=0), zoext.noise.normal(3, seed=seed, key=1)
    slope = 0.01 * (z[0] @ gradient[0]) + 0.04 * (z[1] @ gradient[1])
    assert torch.allclose(first, -0.1 * slope / 0.01 * z[0], rtol=1e-4)
    assert torch.allclose(second, -0.2 * slope / 0.04 * z[1], rtol=1e-4)


def test_freezing_a_layer_does_not_change_the_noise_of_the_others() -> None:
    moves = []
    for freeze in (False, True):
        model = model_of(torch.float32)
        model[0].requires_grad_(not freeze)
        before = model[4].weight.detach().clone()
        optimizer = zoext.MeZO(model, lr=LR, mu=MU, seed=SEED)
        optimizer.step(lambda model=model: model(torch.ones(8, 5)).square().mean())
        assert optimizer.last_estimate is not None
        moves.append((model[4].weight.detach() - before) / optimizer.last_estimate.coefficients)
    assert torch.allclose(*moves, rtol=1e-2, atol=1e-4)
