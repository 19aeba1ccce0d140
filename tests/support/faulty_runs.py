"""A small run whose forwards fail when they are told to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zoext
from support.graphed_runs import RECIPES

#: The named optimizers, at hyper-parameters that are not the default.
NAMED = ("mezo", "adamezo", "agzo", "gv", "greedy", "lozo")

Strike = Callable[[Tensor], Tensor]


def raises(error: type[BaseException]) -> Strike:
    def strike(value: Tensor) -> Tensor:
        raise error("injected")

    return strike


def interrupts(value: Tensor) -> Tensor:
    """A real Ctrl-C."""
    signal.raise_signal(signal.SIGINT)
    return value


def becomes(number: float) -> Strike:
    return lambda value: value + number


#: What may happen to a value on its way through a forward.
ERRORS: dict[str, Strike] = {
    "error": raises(RuntimeError),
    "out of memory": raises(torch.OutOfMemoryError),
    "no memory": raises(MemoryError),
    "KeyboardInterrupt": raises(KeyboardInterrupt),
    "Ctrl-C": interrupts,
}
BAD_LOSSES: dict[str, Strike] = {
    str(bad): becomes(bad) for bad in (float("nan"), float("inf"), -float("inf"))
}


class Faulty(nn.Module):
    """Multiplies by weights; ``strike`` may happen to what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        # Moved, though no forward depends on it: signs of zero and subnormal numbers must come back too.
        self.special = nn.Parameter(torch.tensor([-0.0, 0.0, 1e-39, -1e-7]))
        self.strike: Strike | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return self.strike(y) if self.strike else y


class FaultyRun:
    """A model with buffers and an optimizer; batches depend on the step number alone."""

    def __init__(self, recipe: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(11)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Faulty(), nn.Linear(4, 3)).to(dtype)
        settings = {"lr": 2e-2, "mu": 1e-2, "weight_decay": 0.1, "seed": 2**64 - 5, **options}
        self.optimizer: zoext.ZerothOrderOptimizer = RECIPES[recipe](self.model, **settings)
        self.forwards = 0

    @property
    def steps(self) -> int:
        return int(self.optimizer.param_groups[0]["step"])

    def step(self, strike: Strike | None = None, at: int = 1, *, in_module: bool = False) -> Tensor:
        """A step; ``strike`` happens to the loss of forward ``at`` and all later ones, or in the module."""
        generator = torch.Generator().manual_seed(self.steps)
        x = torch.randn(5, 3, generator=generator).to(self.model[0].weight.dtype)
        y = torch.randint(0, 3, (5,), generator=generator)
        faulty = self.model[2]
        assert isinstance(faulty, Faulty)
        self.forwards = 0

        def closure() -> Tensor:
            self.forwards += 1
            strikes = strike if self.forwards >= at else None
            faulty.strike = strikes if in_module else None
            loss = nn.functional.cross_entropy(self.model(x).float(), y)
            return strikes(loss) if strikes and not in_module else loss

        try:
            return self.optimizer.step(closure)
        finally:
            faulty.strike = None

    def healthy(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def bits(self) -> bytes:
        """Of the weights, the buffers and the residuals."""
        tensors = list(self.model.state_dict().values())
        for parameter in self.model.parameters():
            tensors += self.optimizer.state.get(parameter, {}).values()
        return b"".join(bytes_of(tensor) for tensor in tensors)

    def state(self) -> list[Any]:
        """All that a step leaves behind."""
        return [self.model.state_dict(), self.optimizer.state_dict()]


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
