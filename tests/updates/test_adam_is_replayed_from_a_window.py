"""AdaMeZO: the printed formula from the first step on, and a window of small tensors to make it of."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

SEED = 5
SLOPES = [3.0, -2.0, 0.5, 4.0, -1.0, 2.5]


def moves(optimizer: zoext.ZerothOrderOptimizer, theta: nn.Parameter, slopes: list[float]) -> list[Tensor]:
    """What each step adds to theta, where the loss has the given slope along the step's direction."""
    changes = []
    for step, slope in enumerate(slopes):
        z = zoext.noise.normal(theta.shape, seed=zoext.noise.step_seed(SEED, step)).double()
        before = theta.detach().clone()
        weights = slope * z / (z * z).sum()
        optimizer.step(lambda weights=weights: (theta.double() * weights).sum())
        changes.append((theta.detach() - before).double())
    return changes


def printed(slopes: list[float], shape: torch.Size, options: dict[str, Any]) -> list[Tensor]:
    """theta_t - theta_{t-1} as arXiv 2605.00650 prints it, term by term."""
    (b1, b2), horizon, eps = options["betas"], options["horizon"], options["eps"]
    g: list[Tensor] = []
    changes = []
    for step, slope in enumerate(slopes):
        g.append(slope * zoext.noise.normal(shape, seed=zoext.noise.step_seed(SEED, step)).double())
        n = min(step + 1, horizon)
        m = sum((1 - b1) * b1**lag * g[step - lag] for lag in range(n))
        v = sum((1 - b2) * b2**lag * g[step - lag] ** 2 for lag in range(n))
        if options["bias_correction"]:
            m, v = m / (1 - b1**n), v / (1 - b2**n)
        changes.append(-options["lr"] * (m if b2 == 0 else m / torch.sqrt(v + eps)))
    return changes


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("betas", [(0.7, 0.9), (0.9, 0.999), (0.0, 0.5), (0.8, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("horizon", [1, 3, 10])
def test_steps_are_the_printed_formula(
    bias_correction: bool, betas: tuple[float, float], horizon: int
) -> None:
    """Six steps: windows that are short, just full, and full."""
    options = {
        "lr": 1e-3,
        "betas": betas,
        "horizon": horizon,
        "eps": 1e-2,
        "bias_correction": bias_correction,
    }
    theta = nn.Parameter(torch.zeros(7, 13, dtype=torch.float64))
    optimizer = zoext.AdaMeZO([theta], mu=1e-2, seed=SEED, **options)
    expected = printed(SLOPES, theta.shape, options)
    for change, formula in zip(moves(optimizer, theta, SLOPES), expected, strict=True):
        assert (change - formula).abs().max() <= 1e-5 * formula.abs().max()


def test_the_first_step_has_the_length_of_its_lr() -> None:
    """With correction m / sqrt(v) is a sign at the first step: no other method stands in for it."""
    theta = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = zoext.AdaMeZO([theta], lr=0.25, seed=SEED, eps=1e-30)
    (change,) = moves(optimizer, theta, [3.0])
    assert torch.allclose(change.abs(), torch.full_like(change, 0.25), rtol=1e-5)


def test_moments_are_of_whole_estimates() -> None:
    """With horizon 1 and correction the step is g / |g|, also where g has several terms."""
    theta = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    target = torch.linspace(-1, 1, 40, dtype=torch.float64)
    for estimator in (zoext.CentralDifference(samples=3), zoext.GuidingVector(pool_size=5)):
        optimizer = zoext.ZerothOrderOptimizer(
            [theta], estimator=estimator, update=zoext.AdamReplay(horizon=1, eps=1e-30), lr=0.5, seed=SEED
        )
        before = theta.detach().clone()
        optimizer.step(lambda: ((theta - target) ** 2).sum())
        assert torch.allclose((theta - before).abs(), torch.full_like(before, 0.5), rtol=1e-5)


def test_decay_is_decoupled() -> None:
    theta = nn.Parameter(torch.full((5,), 2.0))
    optimizer = zoext.AdaMeZO([theta], lr=0.1, weight_decay=0.5)
    optimizer.step(lambda: theta.sum() * 0)
    assert torch.allclose(theta, torch.full((5,), 2.0 * (1 - 0.05)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_moves_nothing_and_enters_as_zero(bad: float) -> None:
    lr, decay = 0.1, 0.2
    ends = []
    for second in (bad, 0.0):  # a loss without slope is a gradient of zero
        torch.manual_seed(0)
        model = nn.Linear(9, 4)
        optimizer = zoext.AdaMeZO(model, lr=lr, seed=SEED, weight_decay=decay, nonfinite="skip")
        for step, factor in enumerate((1.0, second, 1.0)):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            optimizer.step(lambda model=model, factor=factor: model(torch.ones(9)).sum() * factor)
            if step == 1:
                for parameter, old in zip(model.parameters(), before, strict=True):
                    assert torch.equal(parameter, old) == (factor != 0)
                    with torch.no_grad():
                        parameter.copy_(old)  # so that only the windows could differ
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
        assert optimizer.nonfinite_steps == (second != 0)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_window_is_small_and_part_of_state_dict() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5)).bfloat16()
    optimizer = zoext.AdaMeZO(model, horizon=4)
    for _ in range(6):
        optimizer.step(lambda: model(torch.ones(30, dtype=torch.bfloat16)).float().square().mean())
    (group,) = optimizer.state_dict()["param_groups"]
    window = group["update_state"][0]["window"]
    assert len(window) == 4
    for entry in window:
        keys = entry.pop("keys")
        assert {name: (x.dtype, tuple(x.shape)) for name, x in entry.items()} == {
            "seeds": (torch.int64, (1,)),
            "coefficients": (torch.float32, (1,)),
        }
        assert keys == [0, 1, 2, 3]
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "direction", [zoext.Gaussian(), zoext.Rademacher(), zoext.LowRank(), zoext.ActivationSubspace()]
)
def test_resuming_is_bit_identical(dtype: torch.dtype, direction: zoext.Direction) -> None:
    """Saved in mid-window, loaded into new objects, in any storage."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    axes = {"direction": direction, "update": zoext.AdamReplay(horizon=3, betas=(0.6, 0.7))}

    def run(model: nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(lambda: model(x).float().square().mean())

    optimizer = zoext.ZerothOrderOptimizer(model, lr=1e-2, mu=1e-2, seed=SEED, **axes)
    run(model, optimizer, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    run(model, optimizer, 3)
    resumed = zoext.ZerothOrderOptimizer(other, lr=0.5, seed=1, **axes)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(other, resumed, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_that_were_saved_do_not_change_later() -> None:
    model = nn.Linear(3, 2)
    optimizer = zoext.AdaMeZO(model, horizon=2)
    optimizer.step(lambda: model(torch.ones(3)).sum())
    saved = optimizer.state_dict()["param_groups"][0]["update_state"][0]
    seeds = [entry["seeds"].clone() for entry in saved["window"]]
    optimizer.step(lambda: model(torch.ones(3)).sum())
    assert len(saved["window"]) == 1
    assert torch.equal(saved["window"][0]["seeds"], seeds[0])


def test_groups_have_windows_of_their_own() -> None:
    """A group with another mu has other coefficients; both follow the formula for the same gradient."""
    first, second = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [first], "mu": 0.01}, {"params": [second], "mu": 0.04}]
    optimizer = zoext.AdaMeZO(groups, lr=0.1, betas=(0.5, 0.0), seed=SEED)
    for _ in range(3):
        optimizer.step(lambda: first.sum() + 2 * second.sum())
    windows = [group["update_state"]["window"] for group in optimizer.param_groups]
    for a, b in zip(*windows, strict=True):
        assert torch.allclose(a["coefficients"], 4 * b["coefficients"])


@pytest.mark.parametrize(
    "direction", [zoext.Gaussian(), zoext.LowRank(rank=1), zoext.ActivationSubspace(), zoext.Rademacher()]
)
def test_a_thawed_layer_knows_nothing_of_the_steps_it_was_frozen_in(direction: zoext.Direction) -> None:
    """With momentum and an estimate of zero it stays where it is, while the others move on."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = zoext.ZerothOrderOptimizer(
        model, direction=direction, update=zoext.AdamReplay(horizon=3, betas=(0.9, 0.0)), lr=1e-2
    )
    model[0].requires_grad_(False)
    for _ in range(3):
        optimizer.step(lambda: model(torch.ones(2, 4)).square().sum())
    model[0].requires_grad_(True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step(lambda: 0 * model(torch.ones(2, 4)).sum())
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]
    optimizer.step(lambda: model(torch.ones(2, 4)).square().sum())
    assert not torch.equal(model[0].weight, before[0])


def test_the_window_of_a_frozen_group_ages() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    groups = [{"params": list(layer.parameters())} for layer in model]
    optimizer = zoext.AdaMeZO(groups, horizon=3, lr=1e-2, betas=(0.9, 0.0))
    optimizer.step(lambda: model(torch.ones(2, 4)).square().sum())
    model[0].requires_grad_(False)
    for _ in range(3):
        optimizer.step(lambda: model(torch.ones(2, 4)).square().sum())
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    optimizer.step(lambda: 0 * model(torch.ones(2, 4)).sum())
    assert (model[0].weight - before).abs().max() <= 1e-6  # what restoring in place leaves


def test_other_default_dtypes_change_nothing() -> None:
    ends = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
        x = torch.ones(2, 4)
        axes = [
            {"estimator": zoext.GuidingVector(weighting="centered"), "direction": zoext.LowRank()},
            {"estimator": zoext.GreedyPool(), "direction": zoext.ActivationSubspace()},
            {"estimator": zoext.ForwardDifference(), "weight_decay": 0.1},
        ]
        torch.set_default_dtype(dtype)
        try:
            for some in axes:
                optimizer = zoext.ZerothOrderOptimizer(model, update=zoext.AdamReplay(), lr=1e-3, **some)
                optimizer.step(lambda model=model, x=x: model(x).square().sum())
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon must be an integer of at least 1, not 0"),
        ({"horizon": 2.0}, "horizon must be"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\), not \(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, "betas must be"),
        ({"betas": (0.9,)}, "betas must be"),
        ({"betas": 0.9}, "betas must be"),
        ({"betas": (math.nan, 0.9)}, "betas must be"),
        ({"eps": 0.0}, r"eps must be a float from 1.18e-38 to 3.4e\+38, not 0.0"),
        ({"eps": 1e-40}, "eps must be"),
        ({"eps": math.nan}, "eps must be"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoext.AdaMeZO(nn.Linear(2, 2), **options)
