"""The probe that an estimator is given, from a closure."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoext import probes
from zoext._runtime.randomness import RandomState
from zoext.directions import Observer
from zoext.estimators import Estimate

if TYPE_CHECKING:
    from zoext.optimizer import ZerothOrderOptimizer

Closure = Callable[[], Tensor | float]


class Losses:
    """The probe that an estimator is given: losses of the closure at displaced weights.

    ``observer`` makes the frame of the step out of the first forward at theta. If the estimator begins
    with another one, there is one more forward before it.
    """

    def __init__(
        self,
        optimizer: ZerothOrderOptimizer,
        evaluate: probes.Evaluate,
        closure: Closure,
        observer: Observer | None,
        random: RandomState | None,
    ) -> None:
        self._optimizer = optimizer
        self._evaluate = evaluate
        self._closure = closure
        self._observer = observer
        self._device = next(group.device for group in optimizer._groups if len(group))
        self._random = random
        self._forwards = 0
        self._own_forwards = 0

    def __call__(self, seeds: Tensor, coefficients: Tensor) -> Tensor:
        if self._observer is not None:
            if len(seeds):
                self._own_forwards += 1
                self._observe(seeds[:0], coefficients[:0])
            else:
                return self._observe(seeds, coefficients)
        return self._loss(seeds, coefficients)

    def _observe(self, seeds: Tensor, coefficients: Tensor) -> Tensor:
        observer, self._observer = self._observer, None
        assert observer is not None
        with observer.watching():
            loss = self._loss(seeds, coefficients)
        self._optimizer._frame, self._optimizer._frame_finite = observer.frame()
        return loss

    def _loss(self, seeds: Tensor, coefficients: Tensor) -> Tensor:
        if self._forwards and self._random is not None:  # all probes of a step see the same random numbers
            self._random.restore()
        self._forwards += 1
        loss = self._evaluate(self._optimizer._combination(seeds, coefficients), self._closure)
        self._optimizer._check_unchanged("the closure began; change them between steps")
        return _as_loss(loss, self._device)

    def complete(self, estimate: Estimate) -> Estimate:
        """The estimate with the forward of our own, and without effect if what it saw was not finite."""
        seen = self._optimizer._frame_finite
        if seen is None:
            return estimate
        return dataclasses.replace(
            estimate,
            coefficients=torch.where(seen, estimate.coefficients, 0.0),
            forwards=estimate.forwards + self._own_forwards,
            finite=estimate.finite & seen,
        )


def _as_loss(loss: object, device: torch.device) -> Tensor:
    """A closure's value as a tensor of no dimension, at least float32, on ``device``."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"closure must return one number, not a tensor of shape {tuple(loss.shape)}; "
                "reduce it, as with .mean()"
            )
        if loss.is_complex():
            raise TypeError(f"closure must return a real number, not {loss.dtype}")
        loss = loss.detach().reshape(())
        return loss.to(device, torch.promote_types(loss.dtype, torch.float32), non_blocking=True)
    if isinstance(loss, bool) or not isinstance(loss, numbers.Real):
        hint = "; did it forget to return the loss?" if loss is None else ""
        raise TypeError(
            f"closure must return the loss as a tensor of one element or a float, not {loss!r}{hint}"
        )
    return torch.full((), float(loss), dtype=torch.float64, device=device)
