"""``SignReplay`` and ``ScalarAdam``: their formulas from the first step on, resumption, bad arguments."""

from __future__ import annotations

import copy
import doctest
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from zoext.updates import scalar_adam, sign_replay

SEED, LR = 5, 1e-3
SLOPES = [3.0, -2.0, 0.5, 4.0, -1.0, 2.5]


def changes(update: zoext.Update) -> list[Tensor]:
    """What each step adds to theta, where the loss has a given slope along the step's direction."""
    theta = nn.Parameter(torch.zeros(7, 13, dtype=torch.float64))
    optimizer = zoext.ZerothOrderOptimizer([theta], update=update, lr=LR, mu=1e-2, seed=SEED)
    found = []
    for step, slope in enumerate(SLOPES):
        z = direction(step)
        weights, before = slope * z / (z * z).sum(), theta.detach().clone()
        optimizer.step(lambda weights=weights: (theta * weights).sum())
        found.append(theta.detach() - before)
    return found


def direction(step: int) -> Tensor:
    return zoext.noise.normal((7, 13), seed=zoext.noise.step_seed(SEED, step)).double()


def moment(values: list[Any], beta: float, step: int, horizon: int, corrected: bool) -> Any:
    n = min(step + 1, horizon)
    total = sum((1 - beta) * beta**lag * values[step - lag] for lag in range(n))
    return total / (1 - beta**n) if corrected else total


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("horizon", [1, 3, 10])
def test_sign_of_the_momentum(beta: float, horizon: int) -> None:
    g = [slope * direction(step) for step, slope in enumerate(SLOPES)]
    for step, change in enumerate(changes(zoext.SignReplay(beta=beta, horizon=horizon))):
        expected = -LR * torch.sign(moment(g, beta, step, horizon, corrected=False))
        torch.testing.assert_close(change, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.0, 0.999), (0.7, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("horizon", [1, 3, 10])
def test_one_second_moment_for_all(betas: tuple[float, float], horizon: int, corrected: bool) -> None:
    update = zoext.ScalarAdam(betas=betas, horizon=horizon, eps=0.25, bias_correction=corrected)
    g = [slope * direction(step) for step, slope in enumerate(SLOPES)]
    squares = [slope**2 for slope in SLOPES]
    for step, change in enumerate(changes(update)):
        m = moment(g, betas[0], step, horizon, corrected)
        v = moment(squares, betas[1], step, horizon, corrected)
        expected = -LR * m / (math.sqrt(v) + 0.25)
        assert (change - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_projected_gradient_of_several_directions_is_their_mean() -> None:
    """With one step in the window the slopes p_i give -lr sum(p_i z_i) / |sum(p_i)|."""
    theta = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    target = torch.linspace(-1, 2, 40, dtype=torch.float64)
    optimizer = zoext.ZerothOrderOptimizer(
        [theta],
        estimator=zoext.CentralDifference(samples=3),
        update=zoext.ScalarAdam(horizon=1, eps=1e-30),
        lr=0.5,
        seed=SEED,
    )
    optimizer.step(lambda: ((theta - target) ** 2).sum())
    z = [zoext.noise.normal((40,), seed=zoext.noise.step_seed(SEED, 0, i)).double() for i in range(3)]
    p = [-2 * (target @ one).item() for one in z]
    expected = -0.5 * sum(a * b for a, b in zip(p, z, strict=True)) / abs(sum(p))
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-4, atol=1e-6)


UPDATES = [
    zoext.SignReplay(beta=0.6, horizon=3),
    zoext.ScalarAdam(betas=(0.5, 0.8), horizon=3),
    zoext.ScalarAdam(),
]
DIRECTIONS = [zoext.Gaussian(), zoext.Rademacher(), zoext.LowRank(rank=2), zoext.ActivationSubspace()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("update", UPDATES)
def test_resuming_is_bit_identical(dtype: torch.dtype, direction: Any, update: zoext.Update) -> None:
    """Saved in mid-window, loaded into new objects."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    x = torch.randn(5, 6, dtype=dtype)

    def run(model: nn.Module, optimizer: zoext.ZerothOrderOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(lambda: model(x).float().square().mean())

    def build(model: nn.Module, **options: Any) -> zoext.ZerothOrderOptimizer:
        return zoext.ZerothOrderOptimizer(model, direction=direction, update=update, **options)

    optimizer = build(model, lr=1e-2, mu=1e-2, seed=SEED)
    run(model, optimizer, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    run(model, optimizer, 3)
    resumed = build(other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(other, resumed, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("update", UPDATES)
def test_a_loss_that_is_not_finite_moves_nothing(update: zoext.Update, bad: float) -> None:
    model = nn.Linear(9, 4)
    optimizer = zoext.ZerothOrderOptimizer(model, update=update, lr=0.1, nonfinite="skip", weight_decay=0.2)
    optimizer.step(lambda: model(torch.ones(9)).sum())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step(lambda: model(torch.ones(9)).sum() * bad)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.step(lambda: model(torch.ones(9)).sum())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (zoext.SignReplay, {"beta": 1.0}, r"beta must be a number in \[0, 1\), not 1.0"),
        (zoext.SignReplay, {"beta": -0.1}, "beta must be"),
        (zoext.SignReplay, {"beta": math.nan}, "beta must be"),
        (zoext.SignReplay, {"beta": "0.9"}, "beta must be a number in .*, not '0.9'"),
        (zoext.SignReplay, {"horizon": 0}, "horizon must be an integer of at least 1, not 0"),
        (zoext.SignReplay, {"horizon": True}, "horizon must be"),
        (zoext.ScalarAdam, {"betas": (0.0, 1.0)}, r"betas must be two numbers in \[0, 1\), not \(0.0, 1.0\)"),
        (zoext.ScalarAdam, {"betas": 0.9}, "betas must be"),
        (zoext.ScalarAdam, {"horizon": 1.5}, "horizon must be"),
        (zoext.ScalarAdam, {"eps": 0.0}, r"eps must be a float from 1.18e-38 to 3.4e\+38, not 0.0"),
        (zoext.ScalarAdam, {"eps": math.inf}, "eps must be"),
    ],
)
def test_arguments_out_of_range(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("module", [sign_replay, scalar_adam])
def test_examples_in_docstrings_run(module: Any) -> None:
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch, "zoext": zoext})
    assert attempted > 0
    assert failed == 0
