"""A plain oracle of whole steps: PyTorch in float64, every direction materialised, every rule in a loop.

Written from the papers' formulas (and from the contract of the noise field), not from ``zoext``: it shares
with it no more than the noise itself, the seeds of a step, and the basis of given activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zoext
from zoext import ops
from zoext.ops import Stream

Tensors = list[Tensor]
Loss = Callable[[nn.Module], Tensor]


def zeros(model: nn.Module) -> Tensors:
    return [torch.zeros_like(parameter, dtype=torch.float64) for parameter in model.parameters()]


def plus(a: Tensors, b: Tensors, scale: float = 1.0) -> Tensors:
    return [x + scale * y for x, y in zip(a, b, strict=True)]


class PlainOptimizer:
    """One step after the other on a model in float64; all its parameters move."""

    def __init__(
        self,
        model: nn.Module,
        direction: Any,
        estimator: Any,
        update: Any,
        *,
        lr: float,
        mu: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        self.model = model
        self.direction, self.estimator, self.update = direction, estimator, update
        self.lr, self.mu, self.weight_decay, self.seed = lr, mu, weight_decay, seed
        self.number = 0
        self.past: list[Tensors] = []
        self.projections: list[float] = []

    @torch.no_grad()
    def step(self, loss: Loss) -> int:
        """Returns how many forwards it took."""
        self.forwards = 0
        self.given = self._given_factors(loss)
        seeds = [zoext.noise.step_seed(self.seed, self.number, i) for i in range(self.estimator.draws)]
        self.directions = [self._direction(seed) for seed in seeds]
        weights, slope, spread = self._estimate(loss)
        gradient = zeros(self.model)
        for direction, weight in zip(self.directions, weights, strict=True):
            gradient = plus(gradient, self._unbiased(direction), slope * weight)
        self._move(gradient, slope * sum(weights), spread)
        self.number += 1
        return self.forwards

    # Directions

    def _given_factors(self, loss: Loss) -> dict[int, Tensor]:
        """The factor that the directions of a step share, float64 [rank, columns], by key."""
        if isinstance(self.direction, zoext.LowRank):
            drawn = self.number // self.direction.refresh_interval * self.direction.refresh_interval
            seed = zoext.noise.step_seed(self.seed, drawn)
            return {
                key: zoext.noise.normal(
                    (self.direction.rank, parameter[0].numel()),
                    seed=seed,
                    key=key,
                    stream=Stream.RIGHT_FACTOR,
                ).double()
                for key, parameter in enumerate(self.model.parameters())
                if parameter.dim() > 1
            }
        if isinstance(self.direction, zoext.ActivationSubspace):
            return self._bases(loss)
        return {}

    def _bases(self, loss: Loss) -> dict[int, Tensor]:
        seen: dict[int, Tensor] = {}
        keys = {id(parameter): key for key, parameter in enumerate(self.model.parameters())}
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        hooks = []
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and id(module.weight) not in tables:

                def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                    seen[keys[id(module.weight)]] = args[0]

                hooks.append(module.register_forward_pre_hook(see))
        self._loss_at(loss, zeros(self.model), 0.0)
        if isinstance(self.estimator, zoext.ForwardDifference):
            self.forwards -= 1  # the same forward is the centre
        for hook in hooks:
            hook.remove()
        seed = torch.tensor([zoext.noise.signed(zoext.noise.step_seed(self.seed, self.number))])
        rank, iterations = self.direction.rank, self.direction.power_iterations
        bases = {}
        for key, activations in seen.items():
            basis, _ = ops.power_iteration(activations, None, seed, rank=rank, iterations=iterations)
            matched = self.direction.balance == "matched"
            bases[key] = basis.double() * (math.sqrt(activations.shape[-1] / rank) if matched else 1)
        return bases

    def _direction(self, seed: int) -> Tensors:
        entries = []
        for key, parameter in enumerate(self.model.parameters()):
            if key in self.given:
                right = self.given[key]
                left = zoext.noise.normal(
                    (right.shape[0], parameter.shape[0]), seed=seed, key=key, stream=Stream.LEFT_FACTOR
                )
                entries.append((left.double().T @ right).reshape(parameter.shape))
            elif isinstance(self.direction, zoext.Rademacher):
                flat = zoext._C.signs(seed, key=key, count=parameter.numel())
                entries.append(torch.from_numpy(flat).double().reshape(parameter.shape))
            else:
                z = zoext.noise.normal(parameter.shape, seed=seed, key=key).double()
                entries.append(z * 0 if self.leaves_still(key) else z)
        return entries

    def _unbiased(self, direction: Tensors) -> Tensors:
        """LOZO's estimate is ``c U V^T / rank``."""
        divides = isinstance(self.direction, zoext.LowRank) and self.direction.scale == "paper"
        return [
            entries / self.direction.rank if divides and key in self.given else entries
            for key, entries in enumerate(direction)
        ]

    # Estimators

    def _loss_at(self, loss: Loss, direction: Tensors, scale: float) -> float:
        self.forwards += 1
        before = [parameter.clone() for parameter in self.model.parameters()]
        for parameter, entries in zip(self.model.parameters(), direction, strict=True):
            parameter += scale * entries
        value = float(loss(self.model))
        for parameter, old in zip(self.model.parameters(), before, strict=True):
            parameter.copy_(old)
        return value

    def _estimate(self, loss: Loss) -> tuple[list[float], float, float]:
        """Weights of the directions, the slope they share, and the spread of the losses."""
        estimator, mu, directions = self.estimator, self.mu, self.directions
        up = [self._loss_at(loss, direction, mu) for direction in directions]
        count = len(directions)
        if isinstance(estimator, zoext.CentralDifference):
            down = [self._loss_at(loss, direction, -mu) for direction in directions]
            slopes = [(a - b) / (2 * mu) / count for a, b in zip(up, down, strict=True)]
            return slopes, 1.0, deviation(up + down)
        if isinstance(estimator, zoext.ForwardDifference):
            centre = self._loss_at(loss, zeros(self.model), 0.0)
            slopes = [(a - centre) / mu / count for a in up]
            return slopes, 1.0, deviation(up if count > 1 else [*up, centre])
        if isinstance(estimator, zoext.GuidingVector):
            weights = guiding_weights(up, estimator.elite_ratio, estimator.weighting)
            v = zeros(self.model)
            for direction, weight in zip(directions, weights, strict=True):
                v = plus(v, direction, weight)
            sides = [self._loss_at(loss, v, side) for side in (mu, -mu)]
            return weights, (sides[0] - sides[1]) / (2 * mu), deviation(up + sides)
        if isinstance(estimator, zoext.Population):
            if not estimator.antithetic:
                return population_weights(up, estimator.shaping, mu), 1.0, deviation(up)
            down = [self._loss_at(loss, direction, -mu) for direction in directions]
            slopes = [(a - b) / mu / (2 * count) for a, b in zip(up, down, strict=True)]
            if estimator.shaping != "centered":
                sides = population_weights(up + down, estimator.shaping, mu)
                slopes = [a - b for a, b in zip(sides[:count], sides[count:], strict=True)]
            return slopes, 1.0, deviation(up + down)
        assert isinstance(estimator, zoext.GreedyPool)
        best = min(range(count), key=lambda i: up[i])
        again = [] if estimator.reuse else [self._loss_at(loss, directions[best], mu)]
        low = self._loss_at(loss, directions[best], -mu)
        weights = [float(i == best) for i in range(count)]
        return weights, (up[best] - low) / (2 * mu), deviation([*up, *again, low])

    # Updates

    def _move(self, gradient: Tensors, projection: float, spread: float) -> None:
        if isinstance(self.update, zoext.SGD):
            scale = 1 / spread if self.update.normalized else 1.0
            change = [-self.lr * scale * g for g in gradient]
        else:
            self.past = [*self.past, gradient][-self.update.horizon :]
            self.projections = [*self.projections, projection][-self.update.horizon :]
            rules = {
                zoext.AdamReplay: self._adam_step,
                zoext.SignReplay: self._sign_step,
                zoext.ScalarAdam: self._scalar_adam_step,
            }
            change = [-self.lr * step for step in rules[type(self.update)]()]
        for key, (parameter, moved) in enumerate(zip(self.model.parameters(), change, strict=True)):
            if not self.leaves_still(key):
                parameter += moved - self.lr * self.weight_decay * parameter

    def leaves_still(self, key: int) -> bool:
        """Whether a parameter neither moves nor decays."""
        return getattr(self.direction, "balance", None) == "freeze" and key not in self.given

    def _adam_step(self) -> Tensors:
        b1, b2 = self.update.betas
        n = len(self.past)
        m, v = zeros(self.model), zeros(self.model)
        for lag, g in enumerate(reversed(self.past)):
            m = plus(m, g, (1 - b1) * b1**lag)
            v = plus(v, [entries**2 for entries in g], (1 - b2) * b2**lag)
        if self.update.bias_correction:
            m, v = [x / (1 - b1**n) for x in m], [x / (1 - b2**n) for x in v]
        if b2 == 0:
            return m
        return [a / torch.sqrt(b + self.update.eps) for a, b in zip(m, v, strict=True)]

    def _sign_step(self) -> Tensors:
        m = zeros(self.model)
        for lag, g in enumerate(reversed(self.past)):
            m = plus(m, g, self.update.beta**lag)
        return [torch.sign(entries) for entries in m]

    def _scalar_adam_step(self) -> Tensors:
        b1, b2 = self.update.betas
        n = len(self.past)
        m, v = zeros(self.model), 0.0
        for lag, (g, p) in enumerate(zip(reversed(self.past), reversed(self.projections), strict=True)):
            m = plus(m, g, (1 - b1) * b1**lag)
            v += (1 - b2) * b2**lag * p**2
        if self.update.bias_correction:
            m, v = [x / (1 - b1**n) for x in m], v / (1 - b2**n)
        return [entries / (math.sqrt(v) + self.update.eps) for entries in m]


def guiding_weights(losses: list[float], elite_ratio: float, weighting: str) -> list[float]:
    """The weights of v over candidates; equal losses keep their order."""
    count = len(losses)
    top = math.floor(elite_ratio * count)
    order = sorted(range(count), key=lambda i: losses[i])
    weights = [0.0] * count
    for place, i in enumerate(order):
        weights[i] = 1 / top if place < top else -1 / (count - top)
    if weighting == "ranked":
        return weights
    mean = sum(losses) / count
    length = math.sqrt(sum(w * w for w in weights) / sum((mean - loss) ** 2 for loss in losses))
    return [(mean - loss) * length for loss in losses]


def population_weights(losses: list[float], shaping: str, mu: float) -> list[float]:
    """What the candidates of a population are weighted with."""
    count = len(losses)
    if shaping == "centered":
        total = sum(losses)
        return [(loss - (total - loss) / (count - 1)) / (mu * count) for loss in losses]
    if shaping == "rank":
        lower = [sum(other < loss for other in losses) for loss in losses]
        equal = [sum(other == loss for other in losses) for loss in losses]
        places = [below + (same - 1) / 2 for below, same in zip(lower, equal, strict=True)]
        return [(place / (count - 1) - 0.5) / count for place in places]
    mean = sum(losses) / count
    std = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / count)
    return [(loss - mean) / std / count for loss in losses]


def deviation(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std())
