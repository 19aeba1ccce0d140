"""The methods that ``tasks.py`` compares: zeroth-order optimizers, and two that differentiate.

A step costs as many forward passes as it takes. A backward pass counts as two, since each product of a layer
has two in the backward pass (Kaplan et al., arXiv 2001.08361, section 2.1). A Jacobian-vector product in
forward mode counts as one more than its forward pass, the "single forward run" of forward gradients (Baydin
et al., arXiv 2202.08587). That favours it: a layer whose weight is trained has two more products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoext.cli._problem import optimizers
from zoext.cli._problem.steps import forwards_of
from zoext.cli._settings import Settings
from zoext.tasks import Batch, Objective


class Learner(ABC):
    """Trains the parameters of a model that require grad."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.model, self.objective = model, objective

    @abstractmethod
    def step(self, batch: Batch, lr: float) -> tuple[Tensor, int]:
        """Takes a step; returns the loss of the batch, and the forward passes that the step counts as."""


Make = Callable[[nn.Module, Objective, float, int], Learner]


@dataclass(frozen=True)
class Method:
    """A way to train, as ``make(model, objective, mu, seed)``.

    Attributes:
        forwards: what a step counts as.
        lr_scale: the middle of its sweep over lr, as a multiple of MeZO's.
    """

    make: Make
    forwards: int
    lr_scale: float = 1.0


class ZerothOrder(Learner):
    """An optimizer of ``zoext`` by its name on the command line."""

    def __init__(self, name: str, model: nn.Module, objective: Objective, mu: float, seed: int) -> None:
        super().__init__(model, objective)
        objective.prepare(model)
        is_wide = next(model.parameters()).dtype == torch.float32
        settings = Settings(optimizer=name, mu=mu, seed=seed, precision="nearest" if is_wide else "residual")
        self._optimizer = optimizers.make(model, settings)

    def step(self, batch: Batch, lr: float) -> tuple[Tensor, int]:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss = self._optimizer.step(lambda: self.objective.loss(self.model, batch))
        return loss, forwards_of(self._optimizer)


class WideWeights:
    """float32 copies of the trained parameters: they hold updates that 16 bits would lose."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.copies = {name: each.detach().float().clone() for name, each in self.parameters.items()}

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the copies into the model."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.copies[name])


class AdamW(Learner):
    """torch's AdamW with gradients from backpropagation, without weight decay as the others."""

    def __init__(self, model: nn.Module, objective: Objective, mu: float, seed: int) -> None:
        super().__init__(model, objective)
        objective.prepare(model)
        self._weights = WideWeights(model)
        self._optimizer = torch.optim.AdamW(self._weights.copies.values(), weight_decay=0.0)

    def step(self, batch: Batch, lr: float) -> tuple[Tensor, int]:
        loss = self.objective.loss(self.model, batch)
        loss.backward()
        for name, parameter in self._weights.parameters.items():
            if parameter.grad is not None:
                self._weights.copies[name].grad = parameter.grad.float()
            parameter.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._weights.write()
        return loss.detach(), 3


class ForwardGradient(Learner):
    """SGD along a normal direction, scaled by the exact derivative along it: MeZO's limit for mu to 0."""

    def __init__(self, model: nn.Module, objective: Objective, mu: float, seed: int) -> None:
        super().__init__(model, objective)
        objective.prepare(model)
        self._weights = WideWeights(model)
        self._generator = torch.Generator().manual_seed(seed)

    def step(self, batch: Batch, lr: float) -> tuple[Tensor, int]:
        direction = {
            name: torch.randn(each.shape, generator=self._generator)
            for name, each in self._weights.copies.items()
        }
        loss, slope = directional_derivative(self.model, self.objective, batch, direction)
        for name, each in self._weights.copies.items():
            each.sub_(direction[name] * (lr * slope))
        self._weights.write()
        return loss, 2


class _LossOf(nn.Module):
    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Batch) -> Tensor:
        return self._objective.loss(self.model, batch)


@torch.no_grad()
def directional_derivative(
    model: nn.Module, objective: Objective, batch: Batch, direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss of a batch and its derivative along ``direction``, by forward-mode differentiation.

    ``direction`` has a tensor for some parameters, by name; the others stand still.
    """
    whole = _LossOf(model, objective)
    parameters = dict(model.named_parameters())
    at = {f"model.{name}": parameters[name].detach() for name in direction}
    along = {f"model.{name}": each.to(parameters[name].dtype) for name, each in direction.items()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(whole, values, (batch,))
        return found

    with sdpa_kernel(SDPBackend.MATH):  # torch has no forward-mode derivative of the fused kernels
        value, slope = jvp(loss, (at,), (along,))
    return value, slope


_ZEROTH_ORDER = ("mezo", "adamezo", "agzo", "lozo", "mezo-gv", "mezo-greedy")
METHODS: dict[str, Method] = {
    **{
        name: Method(
            partial(ZerothOrder, name),
            optimizers.OPTIMIZERS[name].forwards,
            optimizers.OPTIMIZERS[name].lr_scale,
        )
        for name in _ZEROTH_ORDER
    },
    "jvp": Method(ForwardGradient, 2),
    "adamw": Method(AdamW, 3),
}
