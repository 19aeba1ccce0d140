"""A training loop with ZOAccelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

pytest.importorskip("accelerate", reason="needs Accelerate")

from accelerate.state import AcceleratorState, GradientState

from zoext.integrations.accelerate import ZOAccelerator

IGNORED = -100

X = torch.randn(28, 6, generator=torch.Generator().manual_seed(3))
Y = torch.randint(0, 3, (28,), generator=torch.Generator().manual_seed(4))
RAGGED = torch.where(X[:, 0] > -0.1, Y, IGNORED)

MakeOptimizer = Callable[[nn.Module], zoext.ZerothOrderOptimizer]

RECIPES: dict[str, MakeOptimizer] = {
    "MeZO": lambda model: zoext.MeZO(model, lr=0.03, mu=0.02, weight_decay=0.1, seed=5),
    "AGZO": lambda model: zoext.AGZO(model, lr=0.02, mu=0.01, seed=7),
    "AdaMeZO": lambda model: zoext.AdaMeZO(model, lr=0.004, mu=0.02, seed=8),
    "MeZOGV": lambda model: zoext.MeZOGV(model, lr=0.02, mu=0.02, seed=9),
}


def net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, ignore_index=IGNORED)


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)


def loader(batch_size: int, y: Tensor = Y) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@contextmanager
def accelerator(**options: Any) -> Iterator[ZOAccelerator]:
    """One that does not share the state of others."""
    reset()
    try:
        yield ZOAccelerator(cpu=True, **options)
    finally:
        reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(
    make: MakeOptimizer,
    batch_size: int,
    *,
    y: Tensor = Y,
    weigh: bool = False,
    epochs: int = 2,
    group: int = 8,
) -> tuple[Tensor, list[float]]:
    """The weights and the losses of a loop whose groups have ``group`` samples in each process."""
    with accelerator(gradient_accumulation_steps=group // batch_size) as each:
        model, optimizer, data = net(), None, loader(batch_size, y)
        optimizer = make(model)
        model, optimizer, data, scheduler = each.prepare(model, optimizer, data, scheduled(optimizer))
        losses = []
        for _ in range(epochs):
            for batch in data:
                weight = (batch[1] != IGNORED).sum() if weigh else None
                with each.accumulate(model):
                    loss = optimizer.step(lambda *batch: loss_of(model, *batch), *batch, weight=weight)
                    each.clip_grad_norm_(model.parameters(), 0.1)
                    each.clip_grad_value_(model.parameters(), 0.1)
                    scheduler.step()
                    optimizer.zero_grad()
                    if loss is not None:
                        losses.append(loss.item())
        assert all(parameter.grad is None for parameter in model.parameters())
        return weights_of(model), losses


def plain_run(make: MakeOptimizer, *, y: Tensor = Y, epochs: int = 2) -> tuple[Tensor, list[float]]:
    """The same with batches of 8 in a plain loop."""
    model = net()
    optimizer = make(model)
    scheduler, losses = scheduled(optimizer), []
    for _ in range(epochs):
        for batch in loader(8, y):
            losses.append(optimizer.step(lambda batch=batch: loss_of(model, *batch)).item())
            scheduler.step()
    return weights_of(model), losses
