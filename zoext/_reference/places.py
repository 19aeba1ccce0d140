"""Chunks of a tensor and where their elements lie in the noise field."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from zoext.ops import Span

#: Elements that are processed at once. This bounds the memory of temporary tensors to some tens of MiB, and
#: is large enough that launches do not dominate the run time.
CHUNK = 2**18


class Places:
    """Local elements ``start .. start + count - 1`` of a tensor with a span, and their random numbers."""

    def __init__(self, start: int, count: int, span: Span, device: torch.device) -> None:
        base, run, stride = span
        self.start = start
        self.count = count
        self._span = span
        self._device = device
        first = base + start // run * stride + start % run
        is_consecutive = stride == run or start // run == (start + count - 1) // run
        self._first = first if is_consecutive else None

    @cached_property
    def indices(self) -> Tensor:
        """Their indices in the unsharded parameter, int64 [count]."""
        if self._first is not None:
            return torch.arange(self._first, self._first + self.count, device=self._device)
        base, run, stride = self._span
        local = torch.arange(self.start, self.start + self.count, device=self._device)
        row = torch.div(local, run, rounding_mode="floor")
        return base + row * stride + (local - row * run)

    def blocks(self, size: int) -> Tensor:
        """The numbers of the blocks of ``size`` elements to draw for them, int64 [n]."""
        if self._first is not None:
            last = self._first + self.count - 1
            return torch.arange(self._first // size, last // size + 1, device=self._device)
        return self.indices >> (size.bit_length() - 1)

    def pick(self, drawn: Tensor, size: int) -> Tensor:
        """The value of each element, [count], in ``drawn`` [n, m], which was drawn for ``blocks(size)``.

        A block has m values, each of which serves ``size / m`` consecutive elements.
        """
        share = size // drawn.shape[1]
        if self._first is not None:
            for_all = drawn.reshape(-1, 1).expand(-1, share).reshape(-1)
            return for_all.narrow(0, self._first % size, self.count)
        value = (self.indices & (size - 1)) >> (share.bit_length() - 1)
        return drawn.gather(1, value.unsqueeze(1)).squeeze(1)


def chunks(count: int, span: Span, device: torch.device, columns: int = 1) -> Iterator[Places]:
    """Covers ``count`` elements with chunks: whole rows of ``columns`` elements, or parts of one long row."""
    rows = max(CHUNK // max(columns, 1), 1)
    stretch = rows * max(columns, 1)
    for begin in range(0, count, stretch):
        end = min(begin + stretch, count)
        for start in range(begin, end, CHUNK):
            yield Places(start, min(CHUNK, end - start), span, device)
