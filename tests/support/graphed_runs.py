"""What the tests of graphed steps share: a small run, with a graph or without."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import zoext
from support.oracle import bits

Optimizer = zoext.ZerothOrderOptimizer

RECIPES: dict[str, Callable[..., Optimizer]] = {
    "mezo": lambda model, **options: zoext.MeZO(model, samples=2, **options),
    "adamezo": lambda model, **options: zoext.AdaMeZO(model, horizon=3, **options),
    "momentum": lambda model, **options: zoext.AdaMeZO(model, betas=(0.9, 0.0), horizon=2, **options),
    "agzo": lambda model, **options: zoext.AGZO(model, rank=2, **options),
    "lozo": lambda model, **options: zoext.LOZO(model, rank=2, refresh_interval=3, **options),
    "gv": lambda model, **options: zoext.MeZOGV(model, pool_size=3, elite_ratio=0.4, **options),
    "gv centered": lambda model, **options: zoext.MeZOGV(model, weighting="centered", **options),
    "greedy": lambda model, **options: zoext.MeZOGreedy(model, pool_size=3, **options),
    "population": lambda model, **options: Optimizer(
        model, estimator=zoext.Population(5, shaping="rank"), **options
    ),
    "antithetic": lambda model, **options: Optimizer(
        model, estimator=zoext.Population(4, shaping="zscore", antithetic=True), **options
    ),
    "adam over agzo": lambda model, **options: Optimizer(
        model,
        direction=zoext.ActivationSubspace(balance="matched"),
        estimator=zoext.GuidingVector(pool_size=2),
        update=zoext.AdamReplay(horizon=2),
        **options,
    ),
    "adam over lozo": lambda model, **options: Optimizer(
        model,
        direction=zoext.LowRank(rank=2, refresh_interval=2),
        update=zoext.AdamReplay(horizon=3),
        **options,
    ),
    "sign": lambda model, **options: Optimizer(
        model, update=zoext.SignReplay(beta=0.8, horizon=3), **options
    ),
    "scalar adam": lambda model, **options: Optimizer(
        model,
        direction=zoext.LowRank(rank=2, refresh_interval=2),
        estimator=zoext.ForwardDifference(samples=2),
        update=zoext.ScalarAdam(betas=(0.0, 0.8), horizon=3),
        **options,
    ),
    "fzoo": lambda model, **options: Optimizer(
        model,
        direction=zoext.Rademacher(),
        estimator=zoext.ForwardDifference(samples=3),
        update=zoext.SGD(normalized=True),
        **options,
    ),
}


class Run:
    """A model with buffers, a batch that is overwritten in place, and an optimizer."""

    def __init__(
        self,
        recipe: str = "mezo",
        *,
        graphed: bool = True,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(
            nn.Linear(7, 11),
            nn.BatchNorm1d(11),
            nn.GELU(),
            nn.Linear(11, 5),
            nn.LayerNorm(5),
            nn.Linear(5, 3),
        ).to(device, dtype)
        self.x = torch.zeros(6, 7, device=device, dtype=dtype)
        self.y = torch.zeros(6, dtype=torch.long, device=device)
        settings = {"lr": 2e-2, "mu": 1e-2, "weight_decay": 0.1, "seed": 5, **options}
        self.optimizer = RECIPES[recipe](self.model, **settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)
        self._graphed = zoext.GraphedStep(self.optimizer, self.closure) if graphed else None
        self.losses: list[Tensor] = []
        self.estimates: list[Any] = []

    def closure(self) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.x).float(), self.y)

    def step(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(batch)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.y.copy_(torch.randint(0, 3, self.y.shape, generator=generator))
        loss = self._graphed() if self._graphed else self.optimizer.step(self.closure)
        self.scheduler.step()
        self.losses.append(loss)
        self.estimates.append(self.optimizer.last_estimate)

    def steps(self, batches: range) -> Run:
        for batch in batches:
            self.step(batch)
        return self

    def result(self) -> Any:
        """All that a step leaves behind, as a nest of plain data and tensors."""
        fields = ("seeds", "coefficients", "loss", "loss_std", "forwards", "finite")
        return [
            self.model.state_dict(),
            self.optimizer.state_dict(),
            self.losses,
            [[getattr(estimate, field) for field in fields] for estimate in self.estimates],
        ]


class Counts(NamedTuple):
    captures: int
    replays: int


def same(a: Any, b: Any) -> bool:
    """Whether two nests are equal, tensors and floats to the bit: -0 is not 0, and NaN is NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
