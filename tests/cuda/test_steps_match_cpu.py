"""Given the same losses, a step on CUDA moves weights to the CPU's bits, and never waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import zoext
from support.cuda_comparison import MARKS

pytestmark = MARKS

STEPS = 4
RECIPES: dict[str, Callable[..., zoext.ZerothOrderOptimizer]] = {
    "mezo": lambda model, **options: zoext.MeZO(model, samples=2, **options),
    "adamezo": lambda model, **options: zoext.AdaMeZO(model, horizon=3, **options),
    "momentum": lambda model, **options: zoext.AdaMeZO(model, betas=(0.9, 0.0), **options),
    "agzo": lambda model, **options: zoext.AGZO(model, rank=2, **options),
    "agzo matched": lambda model, **options: zoext.AGZO(model, balance="matched", **options),
    "lozo": lambda model, **options: zoext.LOZO(model, rank=3, refresh_interval=2, **options),
    "gv": lambda model, **options: zoext.MeZOGV(model, pool_size=3, elite_ratio=0.4, **options),
    "gv centered": lambda model, **options: zoext.MeZOGV(model, weighting="centered", **options),
    "greedy": lambda model, **options: zoext.MeZOGreedy(model, pool_size=3, **options),
    "adam over agzo": lambda model, **options: zoext.ZerothOrderOptimizer(
        model,
        direction=zoext.ActivationSubspace(),
        estimator=zoext.GuidingVector(pool_size=2),
        update=zoext.AdamReplay(horizon=2),
        **options,
    ),
    "fzoo": lambda model, **options: zoext.ZerothOrderOptimizer(
        model,
        direction=zoext.Rademacher(),
        estimator=zoext.ForwardDifference(samples=3),
        update=zoext.SGD(normalized=True),
        **options,
    ),
}


def losses(bad: int | None) -> Iterator[float]:
    """Numbers with a few bits, so that sums of them are exact on every device."""
    count = 0
    while True:
        yield math.nan if count == bad else (count * 7 % 16) / 8
        count += 1


def weights_after(recipe: str, device: str, dtype: torch.dtype, probe: str, bad: int | None) -> list[Any]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(13, 6), nn.LayerNorm(6)).to(device, dtype)
    x = torch.randn(5, 13).to(device, dtype)
    optimizer = RECIPES[recipe](
        model, lr=0.01, mu=0.05, seed=3, weight_decay=0.1, probe=probe, nonfinite="skip"
    )
    values = losses(bad)

    def closure() -> float:
        model(x)
        return next(values)

    for step in range(STEPS):
        if device == "cuda" and step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step(closure)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("dtype", "probe"),
    [(torch.float32, "streamed"), (torch.bfloat16, "streamed"), (torch.float32, "inplace")],
)
@pytest.mark.parametrize("bad", [None, 3])
def test_steps(recipe: str, dtype: torch.dtype, probe: str, bad: int | None) -> None:
    """Also where a loss was not finite; the recipes ask for different numbers of losses a step."""
    on_cpu, on_cuda = (weights_after(recipe, device, dtype, probe, bad) for device in ("cpu", "cuda"))
    for a, b in zip(on_cpu, on_cuda, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["adamezo", "agzo", "adam over agzo"])
def test_state_goes_to_the_device_of_the_parameters(recipe: str) -> None:
    model = nn.Linear(5, 4)
    optimizer = RECIPES[recipe](model, lr=0.01)
    optimizer.step(lambda: model(torch.ones(2, 5)).sum())
    moved = nn.Linear(5, 4, device="cuda")
    moved.load_state_dict(model.state_dict())
    other = RECIPES[recipe](moved, lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    other.step(lambda: moved(torch.ones(2, 5, device="cuda")).sum())
