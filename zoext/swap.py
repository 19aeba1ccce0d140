"""Replaces the weights of a module while it runs, and puts them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_map
from torch.utils.hooks import RemovableHandle

from zoext.directions import Combination
from zoext.parameters import Parameters

ALIGNMENT = 64


def _aligned_bytes(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


class Scratch:
    """Memory for the weights of the modules that are running: a stack, since modules nest."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._top = 0
        self._wanted = 0

    def prepare(self, device: torch.device, size: int) -> None:
        """Makes room for ``size`` bytes, and for what was needed before."""
        if self._top:
            raise RuntimeError("a streamed probe cannot run inside another one of the same optimizer")
        size = max(size, self._wanted)
        if self._buffer.device != device or self._buffer.numel() < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)

    @property
    def top(self) -> int:
        return self._top

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised tensor like ``like``, contiguous."""
        start = self._top
        self._top += _aligned_bytes(like)
        self._wanted = max(self._wanted, self._top)
        if self._top > self._buffer.numel():  # deeper nesting than before: the next probe has the room
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)
        size = like.numel() * like.element_size()
        return self._buffer[start : start + size].view(like.dtype).view(like.shape)

    def release(self, top: int) -> None:
        self._top = top

    def holds(self, value: object) -> bool:
        """Whether a tensor lies in this memory."""
        if not isinstance(value, Tensor) or value.layout != torch.strided or not self._buffer.numel():
            return False
        return value.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr()


class _Running:
    """A module that is running: what it had, and where the scratch memory stood before it."""

    def __init__(self, top: int) -> None:
        self.depth = 1
        self.top = top
        self.parameters: list[tuple[Tensor, Tensor]] = []
        self.buffers: list[tuple[str, Tensor, Tensor]] = []


class ModuleSwap:
    """Hooks on the modules below ``root`` that own parameters or buffers."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._scratch = Scratch()
        self._written_buffers: set[tuple[int, str]] = set()
        self._running: dict[nn.Module, _Running] = {}
        self._swapped: set[int] = set()
        self._originals: dict[int, Tensor] = {}
        self._terms: dict[nn.Module, list[tuple[Parameters, Tensor]]] = {}
        self._combination: Combination | None = None
        self._find_written = False
        self._visited: set[int] = set()

    def training_flags(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self._root.modules())

    @contextmanager
    def installed(self, combination: Combination, find_written_buffers: bool) -> Iterator[set[int]]:
        """Within the block, modules run with displaced weights; yields the ids of those that ran.

        With ``find_written_buffers`` every buffer is replaced, and those that are written to are noted
        for later probes.
        """
        self._combination = combination
        self._find_written = find_written_buffers
        self._visited = set()
        self._terms = self._terms_of_modules(combination)
        # Taken here, not in the hooks: whoever watches operators would see the hooks read weights.
        self._originals = {
            id(tensor): tensor.data for parameters, _ in combination.terms for tensor in parameters.tensors
        }
        handles: list[RemovableHandle] = []
        try:
            self._make_room(combination)
            for module in self._root.modules():
                if module in self._terms or self._buffers_to_swap(module):
                    handles.append(module.register_forward_pre_hook(self._before, prepend=True))
                    handles.append(module.register_forward_hook(self._after, always_call=True))
            yield self._visited
        finally:
            for handle in handles:
                handle.remove()
            for module in reversed(list(self._running)):
                self._restore(module)
            self._combination, self._terms, self._originals = None, {}, {}

    def _terms_of_modules(self, combination: Combination) -> dict[nn.Module, list[tuple[Parameters, Tensor]]]:
        terms: dict[nn.Module, list[tuple[Parameters, Tensor]]] = {}
        owned: set[int] = set()
        if not len(combination):
            return terms
        for module in self._root.modules():
            own = {id(parameter) for parameter in module._parameters.values() if parameter is not None}
            owned |= own
            parts = [(parameters.subset(own), coefficients) for parameters, coefficients in combination.terms]
            parts = [(parameters, coefficients) for parameters, coefficients in parts if len(parameters)]
            if parts:
                terms[module] = parts
        for parameters, _ in combination.terms:
            for tensor, name in zip(parameters.tensors, parameters.names, strict=True):
                if id(tensor) not in owned:
                    raise ValueError(
                        f"streamed probe: {name} is not a parameter of the module that is streamed; build "
                        "the optimizer again after changing the model, or pass probe='inplace'"
                    )
        return terms

    def _make_room(self, combination: Combination) -> None:
        largest = 0
        for module, terms in self._terms.items():
            weights = sum(_aligned_bytes(tensor) for parameters, _ in terms for tensor in parameters.tensors)
            buffers = sum(_aligned_bytes(buffer) for _, buffer in self._buffers_to_swap(module))
            largest = max(largest, weights + buffers)
        self._scratch.prepare(combination.seeds.device, largest)

    def _buffers_to_swap(self, module: nn.Module) -> list[tuple[str, Tensor]]:
        return [
            (name, buffer)
            for name, buffer in module._buffers.items()
            if buffer is not None and (self._find_written or (id(module), name) in self._written_buffers)
        ]

    def _before(self, module: nn.Module, args: Any) -> None:
        if module in self._running:  # calls itself: its weights are displaced already
            self._running[module].depth += 1
            return
        running = self._running[module] = _Running(self._scratch.top)
        self._visited.add(id(module))
        assert self._combination is not None
        for parameters, coefficients in self._terms.get(module, ()):
            # A weight that a running parent shares with this module is displaced already.
            fresh = parameters.subset({id(tensor) for tensor in parameters.tensors} - self._swapped)
            if not len(fresh):
                continue
            displaced = [self._scratch.take(tensor) for tensor in fresh.tensors]
            self._combination.direction.copy_(displaced, fresh, self._combination.seeds, coefficients)
            for tensor, replacement in zip(fresh.tensors, displaced, strict=True):
                running.parameters.append((tensor, self._originals[id(tensor)]))
                self._swapped.add(id(tensor))
                tensor.data = replacement
        for name, buffer in self._buffers_to_swap(module):
            copy = self._scratch.take(buffer).copy_(buffer)
            running.buffers.append((name, buffer, buffer.data))
            buffer.data = copy

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        running = self._running.get(module)
        if running is None:  # its forward raised before it began to run
            return None
        running.depth -= 1
        if running.depth:
            return None
        # What a module returns may be a view of its weights, whose memory the next module will use.
        borrowed = tree_any(self._scratch.holds, output)
        if borrowed:
            output = tree_map(lambda value: value.clone() if self._scratch.holds(value) else value, output)
        self._restore(module)
        return output if borrowed else None

    def _restore(self, module: nn.Module) -> None:
        running = self._running.pop(module)
        for tensor, original in running.parameters:
            tensor.data = original
            self._swapped.discard(id(tensor))
        for name, buffer, original in running.buffers:
            # Not by version counters: batch_norm moves its statistics behind autograd's back.
            if self._find_written and not (module._buffers[name] is buffer and torch.equal(buffer, original)):
                self._written_buffers.add((id(module), name))
            buffer.data = original
            module._buffers[name] = buffer
        self._scratch.release(running.top)
