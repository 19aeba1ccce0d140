"""A stack of memory for displaced weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from zoext._parameters.parameters import Parameters
from zoext.probes._memory import distinct, storage_of

ALIGNMENT = 64


def aligned_bytes(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def bytes_of(tensors: Iterable[Tensor]) -> Counter[torch.device]:
    """The memory that tensors take on each device."""
    found: Counter[torch.device] = Counter()
    for tensor in tensors:
        found[tensor.device] += aligned_bytes(tensor)
    return found


class _Views(NamedTuple):
    like: Parameters  # kept alive, so that its id is not reused
    views: list[Tensor]
    size: int


class Scratch:
    """Memory for the displaced weights of running modules: a stack on each device, because modules nest."""

    def __init__(self) -> None:
        self._stacks: dict[torch.device, _Stack] = {}

    def prepare(self, sizes: Mapping[torch.device, int]) -> None:
        """Ensures that there are at least so many bytes on each device, and as many as were needed before."""
        for device, size in sizes.items():
            self._stack_of(device).prepare(size)

    @property
    def buffers(self) -> list[Tensor]:
        return [stack.buffer for stack in self._stacks.values()]

    @property
    def top(self) -> dict[torch.device, int]:
        return {device: stack.top for device, stack in self._stacks.items()}

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised tensors like ``tensors``, of the same strides if these leave no gaps."""
        if len(devices := {tensor.device for tensor in tensors}) == 1:
            return self._stack_of(devices.pop()).take(tensors)
        return [self._stack_of(tensor.device).take([tensor])[0] for tensor in tensors]

    def take_again(self, parameters: Parameters) -> list[Tensor]:
        """Like ``take``, but returns the same views at every probe for the same parameters.

        Creating views costs more than filling small ones.
        """
        if parameters.is_whole:
            return self._stack_of(parameters.device).take_again(parameters)
        return self.take(parameters.tensors)

    def forget_views(self) -> None:
        """Forgets what ``take_again`` returned."""
        for stack in self._stacks.values():
            stack.forget_views()

    def forget(self) -> None:
        """Forgets what ``take_again`` returned, and memory on devices that may not be used any more."""
        self._stacks = {device: stack for device, stack in self._stacks.items() if stack.top}

    def users(self) -> int:
        """The number of references to this memory, not counting those of the cached views."""
        return sum(stack.users() for stack in self._stacks.values())

    def release(self, top: Mapping[torch.device, int]) -> None:
        for device, stack in self._stacks.items():
            stack.release(top.get(device, 0))

    def holds(self, value: object) -> bool:
        """Whether a tensor lies in this memory."""
        if not isinstance(value, Tensor) or value.device not in self._stacks:
            return False
        return self._stacks[value.device].holds(value)

    def returned(self, output: Any) -> tuple[Any, int]:
        """What a module returns, with clones of tensors that lie in this memory; and how many these are."""
        if isinstance(output, Tensor):
            return (output.clone(), 1) if self.holds(output) else (output, 0)
        if not (count := len(distinct(output, self.holds))):
            return output, 0
        return tree_map(lambda value: value.clone() if self.holds(value) else value, output), count

    def _stack_of(self, device: torch.device) -> _Stack:
        if device not in self._stacks:
            self._stacks[device] = _Stack(device)
        return self._stacks[device]


class _Stack:
    """The memory on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._top = 0
        self._wanted = 0
        self._views: dict[tuple[int, int], _Views] = {}
        self._kept = 0
        self._idle = self._count()  # references when no view is in use

    def prepare(self, size: int) -> None:
        if self._top:
            raise RuntimeError("a streamed probe cannot run inside another one of the same optimizer")
        size = max(size, self._wanted)
        if self._buffer.device != self._device or self._buffer.numel() < size:
            self.forget_views()  # otherwise they would keep the old buffer alive
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._idle = self._count()

    @property
    def buffer(self) -> Tensor:
        return self._buffer

    @property
    def top(self) -> int:
        return self._top

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        offset = self._top
        self._top += sum(aligned_bytes(tensor) for tensor in tensors)
        self._wanted = max(self._wanted, self._top)
        if self._top > self._buffer.numel():  # deeper nesting than before; ``prepare`` grows the buffer
            return [empty_like(tensor) for tensor in tensors]
        views = []
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            view = self._buffer[offset : offset + size].view(tensor.dtype)
            shape = tensor.shape
            is_strided = not tensor.is_contiguous()
            views.append(view.as_strided(shape, _strides(tensor)) if is_strided else view.view(shape))
            offset += aligned_bytes(tensor)
        return views

    def take_again(self, parameters: Parameters) -> list[Tensor]:
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
        return self._count() - self._idle - self._kept

    def _count(self) -> int:
        return int(torch._C._storage_Use_Count(self._buffer.untyped_storage()._cdata))

    def release(self, top: int) -> None:
        self._top = top

    def holds(self, value: Tensor) -> bool:
        return self._buffer.numel() > 0 and storage_of(value) == storage_of(self._buffer)


def empty_like(tensor: Tensor) -> Tensor:
    """Like ``torch.empty_like``, but without an operator that reads ``tensor``, which would be watched."""
    return torch.empty_strided(tensor.shape, _strides(tensor), dtype=tensor.dtype, device=tensor.device)


def _strides(tensor: Tensor) -> list[int]:
    """Strides in the order of those of ``tensor``, without gaps."""
    strides, count = [0] * tensor.dim(), 1
    for _, dim in sorted((stride, -dim) for dim, stride in enumerate(tensor.stride())):
        strides[-dim] = count
        count *= tensor.shape[-dim]
    return strides
