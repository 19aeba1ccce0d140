"""A stand-in for a CUDA graph: it records operators and runs them again, and no Python code with them.

As with a CUDA graph,

- a replay reads and writes the memory of the capture: whatever tensors pointed there then, and whatever was
  freed since is an error;
- numbers are those of the capture;
- the capture itself changes nothing: what it wrote is put back, and its own memory is filled with rubbish;
- what would make the host wait raises.

Unlike a CUDA graph it does not use its own memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_iter, tree_map_only

from zoext.graphs._capturable import HostWaits

T = TypeVar("T")


class Place(NamedTuple):
    """Where a tensor lies; keeps the memory no more than an address does."""

    storage: StorageWeakRef
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        storage = StorageWeakRef(tensor.untyped_storage())
        offset, stride = tensor.storage_offset(), tensor.stride()
        return cls(storage, offset, tensor.shape, stride, tensor.dtype, tensor.device)

    def tensor(self) -> Tensor:
        if not self.shape.numel():  # no memory, so no address
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "the graph reads memory that was freed after it was captured"
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


class Call(NamedTuple):
    operator: Any
    args: Any
    kwargs: Any
    outputs: list[Place | None]  # None for what lies in the memory of an argument

    def run(self) -> None:
        args, kwargs = tree_map_only(Place, Place.tensor, (self.args, self.kwargs), is_leaf=_is_place)
        results = [value for value in tree_iter(self.operator(*args, **kwargs)) if isinstance(value, Tensor)]
        for place, result in zip(self.outputs, results, strict=True):
            if place is not None:
                place.tensor().copy_(result)


def _is_place(value: object) -> bool:
    return isinstance(value, Place)


class Recorder(HostWaits):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.own: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Place, Tensor]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        places = tree_map_only(Tensor, Place.of, (args, kwargs or {}))
        known = {place.storage.cdata for place in tree_iter(places, is_leaf=_is_place) if _is_place(place)}
        self._remember(value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        outputs: list[Place | None] = []
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                place = Place.of(value)
                is_new = place.storage.cdata not in known
                outputs.append(place if is_new else None)
                if is_new:
                    self.own[place.storage.cdata] = _whole(value)
        self.calls.append(Call(func, *places, outputs))
        return result

    def _remember(self, tensors: Iterable[Tensor]) -> None:
        """Copies memory that an operator may write; schemas tell it not of all (batch_norm's statistics)."""
        for tensor in tensors:
            whole = _whole(tensor)
            place = Place.of(whole)
            cdata = place.storage.cdata
            if cdata not in self.own and cdata not in self._before:
                self._before[cdata] = place, whole.clone()

    def undo(self) -> None:
        for place, value in self._before.values():
            if not place.storage.expired():
                place.tensor().copy_(value)
        for rubbish in self.own.values():
            rubbish.fill_(0xFF)


def _whole(tensor: Tensor) -> Tensor:
    """All the memory that a tensor is a part of, uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class RecordedGraph:
    """To be put in the place of ``zoext.graphs.CudaGraph``."""

    captures = 0
    replays = 0

    def __init__(self, device: torch.device) -> None:
        self._calls: list[Call] = []
        self._own: list[Tensor] = []

    def capture(self, work: Callable[[], T]) -> T:
        recorder = Recorder()
        try:
            with recorder:
                result = work()
        finally:
            recorder.undo()
        self._calls, self._own = recorder.calls, list(recorder.own.values())
        type(self).captures += 1
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for call in self._calls:
                call.run()
        type(self).replays += 1
