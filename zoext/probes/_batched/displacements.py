"""The weights of the copies: factors and vectors for the closure, others while their module runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._parameters.shards import Block
from zoext._runtime.devices import moved
from zoext.directions import Combination, Terms

#: Elements of the weights that are made once for all calls of their modules, such as biases and norms.
SMALL = 2**16
#: Bytes of the copies of a weight that are made at once: what stays in a cache, and enough to fill a GPU.
PIECE = {"cpu": 2**23, "cuda": 2**26}


class Factors(NamedTuple):
    """``theta + sum_k coefficients[c, k] left_k^T right_k`` for copy c.

    ``left`` is float32 [K or 1, rank, m], ``right`` [K or 1, rank, n] and ``coefficients`` [C, K].
    """

    left: Tensor
    right: Tensor
    coefficients: Tensor


class Displacements:
    """How each weight is displaced in each copy.

    Args:
        combination: its terms have coefficients [C, K], a row for each copy.
        copies: how many copies, C.
        factorable: the ids of the weights that are multiplied as they are, so that factors are enough.
    """

    def __init__(self, combination: Combination, copies: int, factorable: frozenset[int]) -> None:
        self.copies = copies
        self._direction = combination.direction
        self._places: dict[int, tuple[Parameters, Terms, int]] = {}
        self._factors: dict[int, Factors] = {}
        self._made: dict[int, Tensor] = {}
        self._shifts: dict[int, Tensor] = {}
        self._small: list[Tensor] = []  # the values at theta of what is made
        self._gathered: dict[int, tuple[Tensor, int]] = {}
        for parameters, terms in combination.terms:
            ways = _ways(parameters, terms, factorable)
            self._places.update((owner, (parameters, terms, position)) for owner, position in ways.moving)
            self._draw(ways.low_rank, terms)
            self._make(ways.small, terms)

    @contextmanager
    def gathered(self, weights: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """A block in which sharded parameters are given by whole weights: pairs of both."""
        self._gathered = {id(whole): (whole, id(owner)) for whole, owner in weights}
        try:
            yield
        finally:
            self._gathered = {}

    def _key(self, weight: Tensor) -> int:
        return self._gathered[id(weight)][1] if id(weight) in self._gathered else id(weight)

    def moves(self, weight: Tensor | None) -> bool:
        """Whether the copies have other values of a weight than theta."""
        return weight is not None and self._key(weight) in self._places

    def factors(self, weight: Tensor) -> Factors | None:
        """The factors of a matrix; None if its directions have none."""
        return self._factors.get(self._key(weight))

    def weights(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """The values of weights in each copy, [C, *shape] each; theta's for those that do not move."""
        found: dict[int, Tensor] = {}
        weights = list(weights)
        groups: dict[int, tuple[Parameters, Terms, list[int]]] = {}
        for weight in weights:
            if id(weight) in self._gathered:
                parameters, position = self.key_of(weight)
                terms = self._places[self._key(weight)][1]
                found[id(weight)] = self._copies(_whole(parameters, [position], [weight.detach()]), terms)[0]
            elif id(weight) in self._made:
                found[id(weight)] = self._made[id(weight)]
            elif id(weight) in self._places:
                parameters, terms, position = self._places[id(weight)]
                groups.setdefault(id(parameters), (parameters, terms, []))[2].append(position)
            else:
                found[id(weight)] = weight.detach().unsqueeze(0).expand(self.copies, *weight.shape)
        for parameters, terms, positions in groups.values():
            own = parameters.take(positions)
            found.update(zip(map(id, own.owners), self._copies(own, terms), strict=True))
        return [found[id(weight)] for weight in weights]

    def pieces(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Successive rows of a weight, and their values in each copy, [C, rows, ...].

        The values are overwritten when the next rows are asked for, so that a large weight is never whole.
        """
        row = max(1, self.copies * weight[:1].nbytes)
        count = max(1, PIECE.get(weight.device.type, 2**26) // row)
        parameters, position = self.key_of(weight)
        is_whole = parameters.blocks[position].is_whole and weight.is_contiguous()
        if count >= len(weight) or not is_whole or id(weight) in self._gathered:
            yield slice(0, len(weight)), self.weights([weight])[0]
            return
        memory = weight.new_empty((self.copies * count, *weight.shape[1:]))
        terms = self._places[id(weight)][1]
        for first in range(0, len(weight), count):
            rows = slice(first, min(first + count, len(weight)))
            size = rows.stop - first
            out = memory[: self.copies * size].view(self.copies, size, *weight.shape[1:])
            own = rows_of(parameters, position, [weight.detach()[rows]], [first])
            self._direction.copies_([out], own, terms)
            yield rows, out

    def shift(self, bias: Tensor) -> Tensor:
        """The displacement of a bias in each copy, [C, 1, d]."""
        if id(bias) not in self._made:
            return self.weights([bias])[0].sub(bias.detach()).unsqueeze(1)
        if not self._shifts:  # all at once, which is faster
            shifts = torch._foreach_sub(list(self._made.values()), self._small)
            self._shifts.update(zip(self._made, [each.unsqueeze(1) for each in shifts], strict=True))
        return self._shifts[id(bias)]

    def rows(self, table: Tensor, rows: Parameters) -> Tensor:
        """The values of rows of a table in each copy, [C, rows, width]."""
        _, terms, _ = self._places[self._key(table)]
        return torch.cat(self._copies(rows, terms), 1)

    def key_of(self, weight: Tensor) -> tuple[Parameters, int]:
        """The parameters that a weight is among, and its position."""
        parameters, _, position = self._places[self._key(weight)]
        return parameters, position

    def _copies(self, parameters: Parameters, terms: Terms) -> list[Tensor]:
        out = [
            torch.empty((self.copies, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
            for tensor in parameters.tensors
        ]
        self._direction.copies_(out, parameters, terms)
        return out

    def _make(self, small: Parameters, terms: Terms) -> None:
        if len(small):
            self._made.update(zip(map(id, small.owners), self._copies(small, terms), strict=True))
            self._small += [tensor.detach() for tensor in small.tensors]

    def _draw(self, matrices: Parameters, terms: Terms) -> None:
        if not len(matrices):
            return
        once = replace(terms, coefficients=terms.coefficients[0])
        if not all(block.is_whole for block in matrices.blocks):
            matrices = _whole(matrices, range(len(matrices)), matrices.tensors)
        lefts, rights = self._direction.factors(matrices, once)
        with_held = torch.cat((terms.coefficients, torch.ones_like(terms.coefficients[:, :1])), 1)
        columns = zip(matrices.keys, matrices.owners, lefts, rights, strict=True)
        for key, owner, left, right in columns:
            coefficients = terms.coefficients
            if (held := terms.held.get(key)) is not None:  # every copy lacks it
                left, coefficients = torch.cat((left, held.unsqueeze(0))), with_held
            self._factors[id(owner)] = Factors(left, right, moved(coefficients, left.device))


class _Ways(NamedTuple):
    """How parameters are displaced: by factors, made once for all calls, or while their module runs."""

    moving: list[tuple[int, int]]  # ids of the owners, and positions
    low_rank: Parameters
    small: Parameters


def _ways(parameters: Parameters, terms: Terms, factorable: frozenset[int]) -> _Ways:
    """How each parameter is displaced, which hardly ever changes from step to step."""
    kinds = tuple([terms.frame.kind(key) for key in parameters.keys])
    known: _Ways | None = parameters.made.get((factorable, kinds))
    if known is not None:
        return known
    moving, low_rank, small = [], [], []
    for position, (kind, owner) in enumerate(zip(kinds, parameters.owners, strict=True)):
        if kind == "unused":
            continue
        moving.append((id(owner), position))
        if kind != "dense" and owner.dim() == 2 and id(owner) in factorable:
            low_rank.append(position)
        elif owner.numel() <= SMALL and owner.dim() <= 1 and not shards.is_distributed(owner):
            small.append(position)
    found = _Ways(moving, parameters.take(low_rank), parameters.take(small))
    parameters.remember((factorable, kinds), found)
    return found


def rows_of(
    parameters: Parameters, position: int, tensors: Sequence[Tensor], firsts: Sequence[int]
) -> Parameters:
    """Parts of one parameter: tensors of successive rows, and the first row of each."""
    count, shape = len(tensors), parameters.blocks[position].shape
    ends = (0,) * (len(shape) - 1)
    return Parameters(
        tuple(tensors),
        (parameters.keys[position],) * count,
        tuple(
            Block.of_shard(shape, (first, *ends), (len(tensor), *shape[1:]))
            for first, tensor in zip(firsts, tensors, strict=True)
        ),
        (parameters.names[position],) * count,
        tuple(tensor.data_ptr() for tensor in tensors),
        (parameters.owners[position],) * count,
    )


def _whole(parameters: Parameters, positions: Sequence[int], tensors: Sequence[Tensor]) -> Parameters:
    """Parameters of which other tensors are the whole, in place of the parts of this process."""
    taken = parameters.take(positions)
    blocks = tuple(Block.of_shard(each.shape, (0,) * len(each.shape), each.shape) for each in taken.blocks)
    return replace(taken, tensors=tuple(tensors), blocks=blocks, residuals=())
