"""Products of weights with activations: which matrices of a parameter, from which side, with which rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Product(NamedTuple):
    """A matrix was multiplied with activations.

    Attributes:
        key: of the parameter.
        side: the factor that the activations determine: "right" if they are multiplied with the rows of the
            matrix, "left" if with its columns.
        rows: the activations, [..., d].
        entries: the matrices of a stack that they were multiplied with; None if the parameter is a matrix.
        mask: bool [number of entries, *rows.shape[:-1]], which rows belong to each; None if all do.
    """

    key: int
    side: str
    rows: Tensor
    entries: Sequence[int] | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """What a tensor shows of a parameter: a view of it, a copy of such a view, or gathered entries of either.

    Attributes:
        key: of the parameter.
        view: shares memory with the parameter and has the shape that the tensor has, or had before entries
            were gathered. A copy has other strides, which would not tell the dimensions apart.
        entries: int64 [S], the entries of the stack that were gathered; None if none were.
    """

    parameter: Tensor
    key: int
    view: Tensor
    entries: Tensor | None = None

    def products(self, dim: int, rows: Tensor, offsets: Tensor | None) -> list[Product] | None:
        """The products with rows, where ``dim`` is summed over; None if they cannot be told.

        ``offsets`` are those of a grouped product: where the rows of each entry end.
        """
        if rows.dim() == 1:
            rows = rows.unsqueeze(0)
        view, parameter = self.view, self.parameter
        if view.dim() < 2 or not rows.is_floating_point() or rows.shape[-1] != view.shape[dim]:
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(rows):  # within torch.vmap, whose rows are others
            return None
        summed = next((own for own in (-1, -2) if self._is_along(dim, own)), None)
        if summed is None:  # a part of the matrix, which says nothing of the activations of the others
            return None
        product = Product(self.key, "right" if summed == -1 else "left", rows.detach())
        if parameter.dim() == 2:
            return [product]
        first, start = self._place(-3 - summed)
        if self.entries is not None:
            is_whole = (first, start, len(view)) == (0, 0, len(parameter))
            return _of_gathered(product, self.entries, len(parameter)) if is_whole else None
        if view.dim() == 2:
            is_inside = self._is_inside(-3 - dim, -3 - summed, start)
            return [product._replace(entries=[first])] if is_inside else None
        if view.dim() != 3 or (len(view) > 1 and view.stride(0) != parameter.stride(0)):
            return None
        entries = range(first, first + len(view))
        if offsets is not None:
            return _of_groups(product, offsets, entries)
        if rows.dim() == 2:
            return [product._replace(entries=entries)]
        if rows.dim() == 3 and len(rows) == len(entries):
            pairs = zip(entries, product.rows, strict=True)
            return [product._replace(entries=[entry], rows=part) for entry, part in pairs]
        return None

    def _is_along(self, dim: int, own: int) -> bool:
        """Whether dimension ``dim`` of the view is the whole dimension ``own`` of the parameter."""
        length = self.parameter.shape[own]
        # A dimension of length one may have any stride.
        return self.view.shape[dim] == length and (
            length == 1 or self.view.stride(dim) == self.parameter.stride(own)
        )

    def _place(self, other: int) -> tuple[int, int]:
        """Where the view begins: the entry, and the index along the dimension that is not summed over."""
        offset = int(self.view.storage_offset() - self.parameter.storage_offset())
        found = {0: 0, other: 0}
        for own in sorted(found, key=self.parameter.stride, reverse=True):
            if self.parameter.shape[own] > 1:
                found[own], offset = divmod(offset, self.parameter.stride(own))
        return found[0], found[other]

    def _is_inside(self, dim: int, other: int, start: int) -> bool:
        """Whether dimension ``dim`` of the view, from ``start`` along ``other``, stays within one entry."""
        length = self.view.shape[dim]
        if length <= 1 or self.parameter.shape[other] == 1:
            return length <= 1
        step, remainder = divmod(self.view.stride(dim), self.parameter.stride(other))
        return remainder == 0 and start + (length - 1) * step < self.parameter.shape[other]


def _of_groups(product: Product, offsets: Tensor, entries: range) -> list[Product] | None:
    rows = product.rows
    if rows.dim() != 2 or len(offsets) != len(entries):
        return None
    if not offsets.is_cuda:
        bounds = [0, *offsets.tolist()]
        return [
            product._replace(entries=[entry], rows=rows[begin:end])
            for entry, begin, end in zip(entries, bounds, bounds[1:], strict=False)
        ]
    # Segments would wait for the device. Masks read all rows for each entry.
    return [product._replace(entries=entries, mask=masks_of_groups(offsets, len(rows)))]


def _of_gathered(product: Product, index: Tensor, count: int) -> list[Product] | None:
    rows = product.rows
    if rows.dim() != 3 or len(rows) != len(index):
        return None
    of_row = index % count
    if not index.is_cuda:
        order = of_row.argsort(stable=True)
        parts = rows[order].split(torch.bincount(of_row, minlength=count).tolist())
        return [product._replace(entries=[entry], rows=part) for entry, part in enumerate(parts)]
    masks = of_row == torch.arange(count, device=index.device)[:, None]
    return [product._replace(entries=range(count), mask=masks[:, :, None].expand(-1, -1, rows.shape[1]))]


def masks_of_groups(offsets: Tensor, count: int) -> Tensor:
    """bool [groups, count]: which of ``count`` rows belong to each group, given where the groups end."""
    at = torch.arange(count, device=offsets.device)
    ends = offsets.to(at.dtype)
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    return (at >= begins[:, None]) & (at < ends[:, None])
