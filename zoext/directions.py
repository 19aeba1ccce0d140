"""The axis Direction: what does ``D(s)`` look like?

A direction knows how to add a combination ``sum_k c_k D(s_k)`` to parameters and how to write
parameters displaced by it somewhere else. It knows nothing of losses or of learning rates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoext import ops
from zoext.parameters import Parameters


class Direction(ABC):
    """How the entries of ``D(s)`` are drawn from seed ``s``."""

    @abstractmethod
    def axpy_(
        self, parameters: Parameters, seeds: Tensor, coefficients: Tensor, decay: Tensor | None = None
    ) -> None:
        """``theta += sum_k coefficients[k] D(seeds[k]) - decay * theta``, in place."""

    @abstractmethod
    def copy_(
        self, out: Sequence[Tensor], parameters: Parameters, seeds: Tensor, coefficients: Tensor
    ) -> None:
        """``out = theta + sum_k coefficients[k] D(seeds[k])``; theta is only read."""


class _Dense(Direction):
    """Independent entries, straight from the noise field."""

    distribution: ops.Distribution

    def axpy_(
        self, parameters: Parameters, seeds: Tensor, coefficients: Tensor, decay: Tensor | None = None
    ) -> None:
        if decay is None:
            decay = torch.zeros((), device=seeds.device)
        ops.noise_axpy_(
            parameters.tensors,
            seeds,
            coefficients,
            decay,
            parameters.keys,
            parameters.spans,
            distribution=self.distribution,
        )

    def copy_(
        self, out: Sequence[Tensor], parameters: Parameters, seeds: Tensor, coefficients: Tensor
    ) -> None:
        ops.noise_copy_(
            out,
            parameters.tensors,
            seeds,
            coefficients,
            parameters.keys,
            parameters.spans,
            distribution=self.distribution,
        )


@dataclass(frozen=True)
class Gaussian(_Dense):
    """Independent standard normals (MeZO, arXiv 2305.17333)."""

    distribution = ops.Distribution.NORMAL


@dataclass(frozen=True)
class Rademacher(_Dense):
    """Independent signs, +1 or -1 with equal probability (Spall's SPSA; FZOO, arXiv 2506.09034)."""

    distribution = ops.Distribution.SIGN


@dataclass(frozen=True, slots=True)
class Combination:
    """``sum_k c_k D(s_k)``, with coefficients of its own for each group of parameters.

    ``seeds`` is int64 [K]; ``terms`` pairs each group with its coefficients, float32 [K].
    """

    direction: Direction
    seeds: Tensor
    terms: tuple[tuple[Parameters, Tensor], ...]

    def __len__(self) -> int:
        return self.seeds.numel()
