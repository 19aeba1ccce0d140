"""Matrices that have factors: whole parameters, and the entries of parameters that are stacks of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoext import ops
from zoext._parameters.parameters import Parameters
from zoext._parameters.shards import Block, matrix_shape
from zoext._runtime.devices import moved
from zoext.directions._parts import parts
from zoext.directions.base import Drawn, Frame


class Matrix(NamedTuple):
    """A matrix in a parameter, or the part of it that this rank holds."""

    position: int  # of the parameter
    key: int
    entry: int | None  # its number in the stack; None if it is the whole parameter
    local: int  # its number in the part of the stack that this rank holds
    block: Block  # its place within the whole matrix
    span: ops.Span  # its place within the whole parameter

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix in the parameter, or in something of its shape."""
        if self.entry is None:
            return tensor
        # Unseen by the modes that watch for reads of weights that are not displaced: this one displaces them.
        with torch._C._DisableTorchDispatch():
            return tensor.select(0, self.local)


class Operands(NamedTuple):
    """Matrices as operators take them."""

    tensors: list[Tensor]
    left: list[Tensor]  # float32 [T or 1, rank, m] for T terms
    right: list[Tensor]  # float32 [T or 1, rank, n]
    keys: list[int]
    spans: list[ops.Span]
    residuals: list[Tensor]


def matrices_of(parameters: Parameters, frames: Sequence[Frame]) -> list[Matrix]:
    """The matrices of parameters whose factors are in some of the frames."""
    return [
        matrix
        for position, (key, block) in enumerate(zip(parameters.keys, parameters.blocks, strict=True))
        for matrix in _matrices(position, key, block, _factor(key, frames))
    ]


def _matrices(position: int, key: int, block: Block, factor: Tensor) -> Iterator[Matrix]:
    if factor.dim() == 2:
        yield Matrix(position, key, None, 0, block, block.span)
        return
    place = Block.of_shard(block.shape[1:], block.offsets[1:], block.sizes[1:])
    for local in range(block.sizes[0]):
        entry = block.offsets[0] + local
        whole = Block.of_shard(block.shape, (entry, *block.offsets[1:]), (1, *block.sizes[1:]))
        yield Matrix(position, key, entry, local, place, whole.span)


def operands(
    parameters: Parameters,
    matrices: Sequence[Matrix],
    seeds: Tensor,
    frames: Sequence[Frame],
    drawn: dict[int, Drawn] | None = None,
) -> Operands:
    """The matrices with the factors of T terms: ``seeds`` is int64 [T], ``frames`` has an entry for each.

    For a sharded matrix, factors are drawn for the whole matrix and narrowed to the local block. Factors of
    whole parameters are taken from ``drawn``, or put there.
    """
    left, right = factors_of(parameters, matrices, seeds, frames, drawn)
    residuals = [
        matrix.of(residual.view_as(parameters.tensors[matrix.position])) if residual.numel() else residual
        for matrix in (matrices if parameters.residuals else ())
        for residual in (parameters.residuals[matrix.position],)
    ]
    return Operands(
        [matrix.of(parameters.tensors[matrix.position]) for matrix in matrices],
        left,
        right,
        [matrix.key for matrix in matrices],
        [matrix.span for matrix in matrices],
        residuals,
    )


def factors_of(
    parameters: Parameters,
    matrices: Sequence[Matrix],
    seeds: Tensor,
    frames: Sequence[Frame],
    drawn: dict[int, Drawn] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The left and the right factors of ``operands``."""
    given: dict[int, Tensor] = {}
    one = frames[0] if len(frames) == 1 else None
    sides = [
        matrix.key in one.right if one is not None else any(matrix.key in frame.right for frame in frames)
        for matrix in matrices
    ]
    for matrix in matrices:
        if matrix.key not in given:
            given[matrix.key] = _given(matrix.key, frames, parameters.tensors[matrix.position].device)
    found: list[Tensor | None] = [_known(matrix, seeds, drawn) for matrix in matrices]
    missing = [place for place, factor in enumerate(found) if factor is None]
    if missing:
        pairs = [(matrices[place], sides[place]) for place in missing]
        for place, new in zip(missing, _drawn(pairs, given, seeds), strict=True):
            found[place] = new
            if drawn is not None and is_kept(matrices[place]):
                drawn[matrices[place].key] = Drawn(seeds, seeds._version, new)
    lefts, rights = [], []
    for matrix, is_right, factor in zip(matrices, sides, found, strict=True):
        assert factor is not None
        known = given[matrix.key]
        if matrix.entry is not None:
            known = known.select(1, matrix.entry).contiguous()
        left, right = (factor, known) if is_right else (known, factor)
        lefts.append(left if matrix.block.is_whole else _rows_of(matrix.block, left))
        rights.append(right if matrix.block.is_whole else _columns_of(matrix.block, right))
    return lefts, rights


def is_kept(matrix: Matrix) -> bool:
    """Whether the factor of a matrix is kept for other probes of a step."""
    return matrix.entry is None and matrix.block.is_whole


def _known(matrix: Matrix, seeds: Tensor, drawn: dict[int, Drawn] | None) -> Tensor | None:
    known = drawn.get(matrix.key) if drawn else None
    return known.factor if known is not None and known.is_of(seeds) and is_kept(matrix) else None


def _drawn(pairs: Sequence[tuple[Matrix, bool]], given: dict[int, Tensor], seeds: Tensor) -> list[Tensor]:
    """The factors that are not in the frames: rows of the matrices where the right ones are, else columns."""
    drawn, spans = [], []
    for matrix, is_right in pairs:
        known = given[matrix.key]
        rank, length = known.shape[-2], matrix_shape(matrix.block.shape)[0 if is_right else 1]
        size = rank * length
        drawn.append(known.new_empty((seeds.numel(), rank, length)))
        spans.append(((matrix.entry or 0) * size, max(size, 1), 0))
    # Both sides use one stream, so that a layer that stores its weight transposed draws the same numbers.
    stream = ops.Stream.LEFT_FACTOR
    keys = [matrix.key for matrix, _ in pairs]
    for part in parts(drawn, spans):
        own = part.here(seeds)
        for k in range(seeds.numel()):
            here = [factor[k] for factor in part.tensors]
            ops.normal_(here, own[k : k + 1], part.of(keys), part.spans, stream=stream)
    return drawn


def _rows_of(block: Block, left: Tensor) -> Tensor:
    return left.narrow(-1, block.offsets[0], block.sizes[0]).contiguous()


def _columns_of(block: Block, right: Tensor) -> Tensor:
    columns: Tensor = right.unflatten(-1, block.shape[1:])
    for dim in range(1, len(block.shape)):
        columns = columns.narrow(1 + dim, block.offsets[dim], block.sizes[dim])
    return columns.flatten(2).contiguous()


def _factor(key: int, frames: Sequence[Frame]) -> Tensor:
    """The factor of a matrix or of a stack of them, in the first frame that has one."""
    known = frames[0] if len(frames) == 1 else next(frame for frame in frames if frame.holds(key))
    return known.right[key] if key in known.right else known.left[key]


def _given(key: int, frames: Sequence[Frame], device: torch.device) -> Tensor:
    """The factors that the frames hold for a parameter; a single one if all terms share it."""
    known = _factor(key, frames)
    if len(frames) == 1:
        return moved(known, device).unsqueeze(0)
    held = [frame.right.get(key, frame.left.get(key)) for frame in frames]
    if all(factor is known for factor in held):
        return moved(known, device).unsqueeze(0)
    # A matrix that was frozen or unused when a frame was made has no factor in that frame.
    given = [torch.zeros_like(known) if factor is None else factor for factor in held]
    return torch.stack([moved(factor, device) for factor in given])
