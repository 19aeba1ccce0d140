"""A stack of memory for displaced weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoext._parameters.parameters import Parameters

ALIGNMENT = 64


def aligned_bytes(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


class _Views(NamedTuple):
    like: Parameters  # kept alive, so that its id is not reused
    views: list[Tensor]
    size: int


class Scratch:
    """Memory for the displaced weights of running modules: a stack, because modules nest."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._top = 0
        self._wanted = 0
        self._views: dict[tuple[int, int], _Views] = {}
        self._kept = 0

    def prepare(self, device: torch.device, size: int) -> None:
        """Ensures that there are at least ``size`` bytes, and as many as were needed before."""
        if self._top:
            raise RuntimeError("a streamed probe cannot run inside another one of the same optimizer")
        size = max(size, self._wanted)
        if self._buffer.device != device or self._buffer.numel() < size:
            self.forget_views()  # otherwise they would keep the old buffer alive
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)

    @property
    def buffer(self) -> Tensor:
        return self._buffer

    @property
    def top(self) -> int:
        return self._top

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised contiguous tensors like ``tensors``."""
        offset = self._top
        self._top += sum(aligned_bytes(tensor) for tensor in tensors)
        self._wanted = max(self._wanted, self._top)
        if self._top > self._buffer.numel():  # deeper nesting than before; ``prepare`` grows the buffer
            return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
        views = []
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            views.append(self._buffer[offset : offset + size].view(tensor.dtype).view(tensor.shape))
            offset += aligned_bytes(tensor)
        return views

    def take_again(self, parameters: Parameters) -> list[Tensor]:
        """Like ``take``, but returns the same views at every probe for the same parameters.

        Creating views costs more than filling small ones.
        """
        start = self._top
        known = self._views.get((id(parameters), start))
        if known is not None:
            self._top += known.size
            return known.views
        users = self.users()
        views = self.take(parameters.tensors)
        if self._top <= self._buffer.numel():
            self._views[id(parameters), start] = _Views(parameters, views, self._top - start)
            self._kept += self.users() - users
        return views

    def forget_views(self) -> None:
        self._views.clear()
        self._kept = 0

    def users(self) -> int:
        """The number of references to this memory, not counting those of the cached views."""
        return int(torch._C._storage_Use_Count(self._buffer.untyped_storage()._cdata)) - self._kept

    def release(self, top: int) -> None:
        self._top = top

    def holds(self, value: object) -> bool:
        """Whether a tensor lies in this memory."""
        if not isinstance(value, Tensor) or value.layout != torch.strided or not self._buffer.numel():
            return False
        return value.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr()
