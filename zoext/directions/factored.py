"""Low-rank directions for matrices: one factor from the seed, the other from the frame."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from zoext import ops
from zoext._parameters.parameters import Parameters
from zoext._parameters.shards import Block
from zoext._runtime.devices import moved
from zoext.directions._parts import parts
from zoext.directions.base import Direction, Frame, Terms, Window, decay_of, rectangle, terms_of
from zoext.directions.dense import Gaussian

_DENSE = Gaussian()
_CALLER = 5  # warn_of_narrow, check, the optimizer's and the recipe's __init__


class _Factors(NamedTuple):
    left: list[Tensor]
    right: list[Tensor]


class Factored(Direction):
    """``D(s) = L^T R`` for the matrices in the frame, dense normals for all other parameters.

    The factor that is not in the frame has standard normal entries, drawn from the seed.
    """

    #: Scale of the dense directions; with 0 their parameters do not move at all, not even by decay.
    dense_scale: float = 1.0

    def axpy_(self, parameters: Parameters, steps: Sequence[Terms], decay: Tensor | None = None) -> None:
        # A step without terms only decays theta, which needs no factors.
        dense, matrices = _split(parameters, [step.frame for step in steps if len(step)])
        if dense and self.dense_scale:
            _DENSE.axpy_(parameters.take(dense), [self._of_dense(step) for step in steps], decay)
        if matrices:
            these = parameters.take(matrices)
            seeds, coefficients = terms_of(steps)
            frames = [frame for step in steps for frame in _filled_up(step, seeds.shape[-1])]
            factors = _factors(these, seeds.flatten(), frames)
            decays = decay_of(steps, decay)
            for part in parts(these.tensors, these.spans):
                ops.factored_axpy_(
                    part.tensors,
                    part.rows_of(factors.left, -1),
                    part.of(factors.right),
                    part.here(seeds),
                    part.here(coefficients),
                    part.here(decays),
                    part.of(these.keys),
                    part.spans,
                    rounding=these.rounding,
                    residuals=part.rows_of(these.residuals),
                )

    def copy_(self, out: Sequence[Tensor], parameters: Parameters, terms: Terms) -> None:
        dense, matrices = _split(parameters, [terms.frame] if len(terms) else [])
        if dense:
            _DENSE.copy_([out[i] for i in dense], parameters.take(dense), self._of_dense(terms))
        if matrices:
            these = parameters.take(matrices)
            factors = _factors(these, terms.seeds, [terms.frame] * len(terms))
            for part in parts(these.tensors, these.spans, [out[i] for i in matrices]):
                ops.factored_copy_(
                    part.out,
                    part.tensors,
                    part.rows_of(factors.left, -1),
                    part.of(factors.right),
                    part.here(terms.seeds),
                    part.here(terms.coefficients),
                    part.of(these.keys),
                    part.spans,
                )

    def window_(
        self, parameters: Parameters, window: Window, rule: ops.Rule, lr: Tensor, eps: Tensor, decay: Tensor
    ) -> None:
        dense, matrices = _split(parameters, [step.frame for step in window.steps])
        if dense and self.dense_scale:
            scaled = self._window_of_dense(window, rule)
            _DENSE.window_(parameters.take(dense), scaled, rule, lr, eps, decay)
        if matrices:
            these = parameters.take(matrices)
            seeds, coefficients = rectangle(window.steps)
            frames = [step.frame for step in window.steps for _ in range(seeds.shape[1])]
            factors = _factors(these, seeds.flatten(), frames)
            for part in parts(these.tensors, these.spans):
                ops.factored_window_(
                    part.tensors,
                    part.rows_of(factors.left, -1),
                    part.of(factors.right),
                    part.here(seeds),
                    part.here(coefficients),
                    part.here(window.first_weights),
                    part.here(window.second_weights),
                    part.here(lr),
                    part.here(eps),
                    part.here(decay),
                    part.of(these.keys),
                    part.spans,
                    rule=rule,
                    rounding=these.rounding,
                    residuals=part.rows_of(these.residuals),
                )

    def factors(self, parameters: Parameters, terms: Terms) -> tuple[list[Tensor], list[Tensor]]:
        dense, _ = _split(parameters, [terms.frame])
        if dense:
            raise ValueError(
                f"direction: {parameters.names[dense[0]]} has dense directions, which have no factors; "
                "freeze it with requires_grad_(False)"
            )
        left, right = _factors(parameters, terms.seeds, terms.frames)
        return left, right

    def _of_dense(self, terms: Terms) -> Terms:
        if self.dense_scale == 1:
            return terms
        return replace(terms, coefficients=terms.coefficients * self.dense_scale)

    def _window_of_dense(self, window: Window, rule: ops.Rule) -> Window:
        if self.dense_scale == 1:
            return window
        if rule is ops.Rule.SCALAR_ADAM:  # its v is of projected gradients, which dense_scale does not affect
            return replace(window, first_weights=window.first_weights * self.dense_scale)
        return replace(window, steps=[self._of_dense(step) for step in window.steps])


def _filled_up(step: Terms, count: int) -> tuple[Frame, ...]:
    """The frame of each term of a step, padded to ``count`` terms."""
    return step.frames + (step.frame,) * (count - len(step))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix: its first dimension, and the product of the others."""
    return shape[0], prod(shape[1:])


def warn_of_narrow(rank: int, widths: Iterable[tuple[str, int]]) -> None:
    """Warns if some of the matrices, given by name and columns, are narrower than ``rank``."""
    narrow = [f"{name} ({columns})" for name, columns in widths if columns < rank]
    if narrow:
        shown = ", ".join(narrow[:3]) + (f" and {len(narrow) - 3} more" if len(narrow) > 3 else "")
        warnings.warn(
            f"rank={rank} is more than the columns of some matrices, whose directions have the rank of their "
            f"columns: {shown}",
            stacklevel=_CALLER,
        )


def _split(parameters: Parameters, frames: Sequence[Frame]) -> tuple[list[int], list[int]]:
    """The positions of parameters with dense directions, and of matrices that a frame holds."""
    split: tuple[list[int], list[int]] = ([], [])
    for position, key in enumerate(parameters.keys):
        split[any(frame.holds(key) for frame in frames)].append(position)
    return split


def _factors(matrices: Parameters, seeds: Tensor, frames: Sequence[Frame]) -> _Factors:
    """Left (float32 [T or 1, rank, m]) and right factors ([T or 1, rank, n]) of T terms, per matrix.

    ``seeds`` is int64 [T]; ``frames`` has an entry for each of them. For a sharded matrix, factors are drawn
    for the whole matrix and narrowed to the local block, which is m x n.
    """
    columns = zip(matrices.keys, matrices.blocks, matrices.tensors, strict=True)
    drawn = [_empty_drawn(key, block.shape, frames, tensor.device) for key, block, tensor in columns]
    # Both sides use one stream, so that a layer that stores its weight transposed draws the same numbers.
    stream = ops.Stream.LEFT_FACTOR
    spans = [ops.span_of(factor[0]) for factor in drawn]  # of one term
    for part in parts(drawn, spans):
        own = part.here(seeds)
        for k in range(seeds.numel()):
            here = [factor[k] for factor in part.tensors]
            ops.normal_(here, own[k : k + 1], part.of(matrices.keys), part.spans, stream=stream)
    factors = _Factors([], [])
    for key, block, factor in zip(matrices.keys, matrices.blocks, drawn, strict=True):
        given = _given(key, frames, factor.device)
        is_right = any(key in frame.right for frame in frames)
        left, right = (factor, given) if is_right else (given, factor)
        factors.left.append(left if block.is_whole else _rows_of(block, left))
        factors.right.append(right if block.is_whole else _columns_of(block, right))
    return factors


def _rows_of(block: Block, left: Tensor) -> Tensor:
    return left.narrow(-1, block.offsets[0], block.sizes[0]).contiguous()


def _columns_of(block: Block, right: Tensor) -> Tensor:
    columns: Tensor = right.unflatten(-1, block.shape[1:])
    for dim in range(1, len(block.shape)):
        columns = columns.narrow(1 + dim, block.offsets[dim], block.sizes[dim])
    return columns.flatten(2).contiguous()


def _empty_drawn(key: int, shape: Sequence[int], frames: Sequence[Frame], device: torch.device) -> Tensor:
    known = next(frame for frame in frames if frame.holds(key))
    draws_left = key in known.right
    rank = (known.right if draws_left else known.left)[key].shape[0]
    length = matrix_shape(shape)[0 if draws_left else 1]
    return torch.empty((len(frames), rank, length), dtype=torch.float32, device=device)


def _given(key: int, frames: Sequence[Frame], device: torch.device) -> Tensor:
    """The factors that the frames hold for a matrix; a single one if all terms share it."""
    held = [frame.right.get(key, frame.left.get(key)) for frame in frames]
    known = next(factor for factor in held if factor is not None)
    if all(factor is known for factor in held):
        return moved(known, device).unsqueeze(0)
    # A matrix that was frozen when a frame was made has no factor in that frame.
    given = [torch.zeros_like(known) if factor is None else factor for factor in held]
    return torch.stack([moved(factor, device) for factor in given])
