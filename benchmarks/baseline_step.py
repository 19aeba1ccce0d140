"""A step as the script of MeZO (arXiv 2305.17333) and its forks take it, in plain torch."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoext._benchmarking.dense_pass import baseline_perturb


class BaselineStep:
    """Three perturbing passes, two forwards, and an update that draws the noise once more."""

    def __init__(self, model: nn.Module, *, lr: float = 1e-6, mu: float = 1e-3) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._lr = lr
        self._mu = mu

    def __call__(self, closure: Callable[[], Tensor]) -> Tensor:
        seed = random.randrange(10**9)
        baseline_perturb(self._parameters, seed, 1.0, self._mu)
        with torch.inference_mode():
            up = closure()
        baseline_perturb(self._parameters, seed, -2.0, self._mu)
        with torch.inference_mode():
            down = closure()
        projected_gradient = ((up - down) / (2 * self._mu)).item()
        baseline_perturb(self._parameters, seed, 1.0, self._mu)
        self._update(seed, projected_gradient)
        return up

    def _update(self, seed: int, projected_gradient: float) -> None:
        torch.manual_seed(seed)
        for parameter in self._parameters:
            z = torch.normal(
                mean=0.0, std=1.0, size=parameter.shape, dtype=parameter.dtype, device=parameter.device
            )
            parameter.data = parameter.data - self._lr * (projected_gradient * z)
