"""Splits calls of operators, which take contiguous tensors on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from zoext._runtime.devices import moved
from zoext.ops import Span

_T = TypeVar("_T")

#: Elements of a strided tensor that are copied at a time.
PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors for one call: all contiguous ones on a device, or a copy of some rows of a strided one.

    Attributes:
        tensors: contiguous tensors on one device.
        out: where the results go, if the call has other outputs than ``tensors``.
        spans: the spans of ``tensors``.
    """

    tensors: list[Tensor]
    out: list[Tensor]
    spans: list[Span]
    positions: Sequence[int] | None = None  # among the tensors of the whole call; None if these are all
    rows: slice | None = None

    def of(self, values: Sequence[_T]) -> list[_T]:
        """The entries of ``values``, one for each tensor of the whole call, for this one."""
        if self.positions is None or not values:
            return list(values)
        return [values[position] for position in self.positions]

    def rows_of(self, values: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
        """Like ``of``, restricted to the rows of this part, which are along ``dim`` of ``values``."""
        own = self.of(values)
        if self.rows is None:
            return own
        start, count = self.rows.start, self.rows.stop - self.rows.start
        return [value.narrow(dim, start, count).contiguous() if value.numel() else value for value in own]

    def here(self, value: Tensor) -> Tensor:
        """``value`` on the device of this part."""
        return moved(value, self.tensors[0].device)


def parts(
    tensors: Sequence[Tensor], spans: Sequence[Span], out: Sequence[Tensor] | None = None
) -> Iterator[Part]:
    """Splits ``tensors``, which are written to, or only read if there are others in ``out``.

    Rows of strided tensors (channels_last, transposed) are copied, some at a time, and written back when the
    next part is asked for. An element has the index that it has in a contiguous tensor.
    """
    if not tensors:  # all parameters of a group may be frozen
        return
    written = tensors if out is None else out
    strided = [
        position
        for position, pair in enumerate(zip(tensors, written, strict=True))
        if not (pair[0].is_contiguous() and pair[1].is_contiguous())
    ]
    devices = dict.fromkeys(tensor.device for tensor in tensors)
    if not strided and len(devices) <= 1:
        yield Part(list(tensors), list(written), list(spans))
        return
    for device in devices:
        positions = [
            position
            for position, tensor in enumerate(tensors)
            if tensor.device == device and position not in strided
        ]
        if positions:
            here, to = ([column[position] for position in positions] for column in (tensors, written))
            yield Part(here, to, [spans[position] for position in positions], positions)
    for position in strided:
        yield from _pieces(position, tensors[position].detach(), written[position].detach(), spans[position])


def _pieces(position: int, tensor: Tensor, written: Tensor, span: Span) -> Iterator[Part]:
    base, run, stride = span
    width = tensor[0].numel()
    count = max(PIECE // width, 1)
    for start in range(0, len(tensor), count):
        rows = slice(start, min(start + count, len(tensor)))
        piece = tensor[rows].clone(memory_format=torch.contiguous_format)
        # A parameter is cut along its first dimension, so that it is one run, or a run is a part of a row.
        runs, rest = divmod(start * width, run)
        own = (base + runs * stride + rest, min(run, piece.numel()), stride)
        yield Part([piece], [piece], [own], [position], rows)
        written[rows].copy_(piece)
