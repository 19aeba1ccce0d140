"""The buffers that modules write while they run displaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoext.probes._scratch import Scratch


class SwappedBuffer(NamedTuple):
    """A buffer of a running module that points to a copy."""

    name: str
    buffer: Tensor
    original: Tensor


class _KeptBuffers:
    """The values that one probe of a step left in buffers."""

    def __init__(self) -> None:
        self._kept: dict[tuple[nn.Module, str], Tensor] = {}

    def forget(self) -> None:
        """Forgets what was kept."""
        self._kept = {}

    def take(self) -> Callable[[Tensor], None]:
        """Hands over what was kept: a function that writes it if its argument (bool []) holds."""
        kept, self._kept = self._kept, {}
        return partial(_write, kept)


class BufferSwap(_KeptBuffers):
    """Gives running modules copies of the buffers they write, and keeps what one probe of a step left."""

    def __init__(self) -> None:
        super().__init__()
        self._written: set[tuple[int, str]] = set()
        self._keeps = False
        self.finds_written = False

    @property
    def count(self) -> int:
        """How many buffers are known to be written."""
        return len(self._written)

    def begin(self, find_written: bool, keep: bool) -> None:
        """Begins a probe; see ``ModuleSwap.displaced``."""
        self.finds_written, self._keeps = find_written, keep

    def of(self, module: nn.Module) -> list[tuple[str, Tensor]]:
        """The buffers of a module to copy: those that it has written before, or all to find these."""
        return [
            (name, buffer)
            for name, buffer in module._buffers.items()
            if buffer is not None
            and (self.finds_written or (id(module), name) in self._written)
            and _is_plain(buffer)
        ]

    def written_by(self, module: nn.Module) -> list[Tensor]:
        """The buffers that a module is known to write."""
        buffers = module._buffers.items()
        return [each for name, each in buffers if each is not None and (id(module), name) in self._written]

    def swap(self, module: nn.Module, scratch: Scratch) -> list[SwappedBuffer]:
        """Lets the buffers of a module point to copies."""
        swapped = []
        for name, buffer in self.of(module):
            kept = self._kept.get((module, name)) if self._keeps else None  # of its last run in this probe
            copy = scratch.take([buffer])[0].copy_(buffer if kept is None else kept)
            swapped.append(SwappedBuffer(name, buffer, buffer.data))
            buffer.data = copy
        return swapped

    def restore(self, module: nn.Module, swapped: list[SwappedBuffer], scratch: Scratch) -> None:
        """Lets them point to the originals again; finds those that were written, and keeps their values.

        A buffer that has another shape or dtype now stays, as a cache that grew: modules remember its size.
        """
        for name, buffer, original in swapped:
            current = module._buffers.get(name)
            was_replaced = current is not buffer
            now = current if was_replaced and current is not None else buffer.data
            is_alike = _is_alike(now, original)
            if is_alike or was_replaced:
                buffer.data = original
            if is_alike:
                module._buffers[name] = buffer
            else:
                self._kept.pop((module, name), None)
                if scratch.holds(now):
                    module._buffers[name] = now.clone()
            # Version counters do not suffice: batch_norm updates its statistics without changing them.
            if self.finds_written and (was_replaced or not _same(now, original)):
                self._written.add((id(module), name))
            if self._keeps and is_alike and (id(module), name) in self._written:
                self._kept[module, name] = now.detach().clone()


class BufferRestore(_KeptBuffers):
    """Puts buffers back that the forwards of ``root`` write, and keeps what one probe of a step left."""

    def __init__(self, root: nn.Module | None) -> None:
        super().__init__()
        self._root = root
        self._written: set[tuple[nn.Module, str]] = set()

    @contextmanager
    def restored(self, find_written: bool, keep: bool) -> Iterator[None]:
        """A block after which written buffers are what they were before, or stay if they have another shape.

        With ``find_written``, all buffers are compared to find those that the block writes.
        """
        known = dict(self._plain_buffers(find_written))
        before = {place: buffer.detach().clone() for place, buffer in known.items()}
        try:
            yield
        finally:
            for (module, name), buffer in known.items():
                now, original = module._buffers.get(name), before[module, name]
                if now is None or not _is_alike(now, original):
                    continue
                if find_written and (now is not buffer or not _same(now, original)):
                    self._written.add((module, name))
                if (module, name) in self._written:
                    if keep:
                        self._kept[module, name] = now.detach().clone()
                    with torch.no_grad():
                        buffer.copy_(original)
                    if now is not buffer:
                        module._buffers[name] = buffer

    def _plain_buffers(self, all_of_them: bool) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
        places = self._written
        if all_of_them and self._root is not None:
            places = {(module, name) for module in self._root.modules() for name in dict(module._buffers)}
        for module, name in places:
            buffer = module._buffers.get(name)
            if buffer is not None and _is_plain(buffer) and not buffer.is_inference():
                yield (module, name), buffer


def _write(kept: Mapping[tuple[nn.Module, str], Tensor], condition: Tensor) -> None:
    for (module, name), value in kept.items():
        buffer = module._buffers.get(name)
        if buffer is not None and _is_alike(buffer, value) and not buffer.is_inference():
            buffer.copy_(torch.where(condition.to(buffer.device), value, buffer))


def _is_plain(buffer: Tensor) -> bool:
    """Whether it can point to other memory; packed buffers, and those that are offloaded, cannot."""
    is_plain = type(buffer) in (Tensor, nn.Parameter) and buffer.layout == torch.strided
    return is_plain and not (buffer.is_quantized or buffer.is_meta)


def _same(now: Tensor, original: Tensor) -> bool:
    return _is_alike(now, original) and torch.equal(_bytes(now), _bytes(original))


def _is_alike(now: Tensor, original: Tensor) -> bool:
    return now.shape == original.shape and now.dtype == original.dtype


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
