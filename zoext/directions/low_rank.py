"""Low-rank directions with a lazily redrawn right factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoext import ops
from zoext._parameters.parameters import Parameters
from zoext._parameters.shards import matrix_shape
from zoext._runtime.arguments import check_count
from zoext.directions._parts import parts
from zoext.directions.base import Frame, Step, Terms
from zoext.directions.factored import Factored, warn_of_narrow

SCALES = ("paper", "code")


@dataclass(frozen=True)
class LowRank(Factored):
    """``D(s) = U(s) V^T`` for matrices (LOZO, arXiv 2410.07698, algorithm 1), dense normals for vectors.

    U (m x rank) is redrawn for every seed and V (n x rank) every ``refresh_interval`` steps, both with
    standard normal entries. A parameter with more than two dimensions is viewed as a matrix of its first
    dimension by all others. The probe and the update of a step use the same U and V.

    Args:
        rank: columns of U and V. A matrix with fewer columns than that has as many as its own, which a
            UserWarning tells when the optimizer is built.
        refresh_interval: steps between two draws of V, the paper's nu.
        scale: "paper" (default) divides the gradient estimate by the rank, ``c U V^T / rank``, which
            makes it unbiased; "code" omits the division, as the authors' published code does.
            Either way the probe is displaced by ``mu U V^T``.
        defer: hold back the steps of matrices while V stands still, as a sum of U (rank numbers for each
            row), and write them to theta once, when V is redrawn. A step then makes no pass over the
            matrices, and 16-bit weights are rounded once in ``refresh_interval`` steps. Probes are displaced
            from the weights with the sum. ``optimizer.merge()`` writes it earlier, and so do a forward that
            is no probe, ``state_dict()`` and ``load_state_dict()`` of the model or the optimizer, and copying
            or pickling them: weights that are read in other ways, or within a closure, lack up to
            ``refresh_interval`` steps. A weight that is written to meanwhile stays as it was written, with a
            UserWarning; one that is cast or moved gets its steps there. A run is reproducible if these
            happen at the same steps, and ``Trajectory`` records when they did. Needs a linear update
            (``SGD``), streamed or batched probes, unsharded parameters and no weight decay; ``Follower``
            and ``ElasticGroup`` refuse it. Ranks must merge at the same steps: have all of them call
            ``merge()`` before one saves or evaluates alone, else the next step raises. Default False.

    Raises:
        ValueError: for arguments out of range.
    """

    rank: int = 2
    refresh_interval: int = 50
    scale: str = "paper"
    defer: bool = False

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("refresh_interval", self.refresh_interval)
        if self.scale not in SCALES:
            raise ValueError(f"scale must be 'paper' or 'code', not {self.scale!r}")
        if not isinstance(self.defer, bool):
            raise ValueError(f"defer must be True or False, not {self.defer!r}")

    @property
    def defers(self) -> bool:
        return self.defer

    def check(self, module: nn.Module | None, groups: Sequence[Parameters]) -> None:
        warn_of_narrow(
            self.rank,
            (
                (name, matrix_shape(block.shape)[1])
                for group in groups
                for block, name in zip(group.blocks, group.names, strict=True)
                if _is_matrix(block.shape)
            ),
        )

    def origin(self, number: int) -> int:
        return number - number % self.refresh_interval

    def frame(self, step: Step) -> Frame:
        """V of every matrix, from the seed of the step at which it was last drawn."""
        right: dict[int, Tensor] = {}
        for group in step.groups:
            for key, block, tensor in zip(group.keys, group.blocks, group.tensors, strict=True):
                if _is_matrix(block.shape):
                    columns = matrix_shape(block.shape)[1]
                    rank = min(self.rank, columns)
                    right[key] = torch.empty((rank, columns), dtype=torch.float32, device=tensor.device)
        factors, keys = list(right.values()), list(right)
        for part in parts(factors, [ops.span_of(factor) for factor in factors]):
            seed = part.here(step.seed)
            ops.normal_(part.tensors, seed, part.of(keys), part.spans, stream=ops.Stream.RIGHT_FACTOR)
        return Frame(right=right)

    def step_scale(self, factor: Tensor) -> float:
        return 1.0 if self.scale == "code" else 1 / factor.shape[-2]

    def gradient(self, terms: Terms) -> Terms:
        if self.scale == "code" or self.rank == 1 or self.defer:  # sums are scaled when a step is added
            return terms
        # Products have the same bits on every device; quotients may not.
        scaled = {key: factor * self.step_scale(factor) for key, factor in terms.frame.right.items()}
        return Terms(terms.seeds, terms.coefficients, Frame(right=scaled))


def _is_matrix(shape: Sequence[int]) -> bool:
    return len(shape) > 1 and 0 not in shape
