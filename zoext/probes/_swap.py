"""Replaces the weights of a module while it runs, and restores them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._runtime.interrupts import Signals
from zoext._runtime.profiling import Phase, record
from zoext.directions import Combination, Terms
from zoext.probes import _rows
from zoext.probes._buffers import BufferSwap, SwappedBuffer
from zoext.probes._gathers import GatherSwap
from zoext.probes._hooks import Hook
from zoext.probes._memory import distinct, overlap
from zoext.probes._owners import SEES_CLASSES, Owners
from zoext.probes._reads import ReadGuard
from zoext.probes._scratch import Scratch, aligned_bytes, empty_like


class StreamedProbeError(RuntimeError):
    """The model cannot be streamed: it uses weights while the modules that own them are not running."""


class _Swapped(NamedTuple):
    """A parameter that points to displaced values."""

    parameter: Tensor
    local: Tensor  # the tensor that points to them: for a DTensor, its part
    original: Tensor


class _Running:
    """A running module: its original tensors, and the state of the scratch memory before it ran."""

    def __init__(self, top: dict[torch.device, int], users: int) -> None:
        self.depth = 1
        self.top = top
        self.users = users
        self.parameters: list[_Swapped] = []
        self.buffers: list[SwappedBuffer] = []
        self.rows: list[int] | None = None


class ModuleSwap:
    """Swaps weights with hooks on ``root`` and the modules below it that own parameters or buffers."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules: list[nn.Module] = []  # as of the beginning of the session
        self._signals = Signals()
        self._scratch = Scratch()
        self._buffers = BufferSwap()
        self._gathers = GatherSwap(self._scratch)
        self._running: dict[nn.Module, _Running] = {}
        self._room: dict[tuple[torch.device, bool, int], dict[torch.device, int]] = {}
        self._guard = ReadGuard(self.hold)
        self._guarded: list[Tensor] = []  # until the probe ends: weights that move
        self._held: list[_Swapped] = []  # until the probe ends
        self._outside: dict[int, str] = {}  # the names of weights to hold, since they are read elsewhere
        self._owners = Owners()
        self._swapped: set[int] = set()
        self.originals: dict[int, Tensor] = {}  # of weights that are displaced, by their ids
        self._terms: dict[nn.Module, list[tuple[Parameters, Terms]]] = {}
        self._combination: Combination | None = None
        self._visited: set[int] = set()
        self.is_displacing = False  # reading the originals, to make the displaced weights of them
        self._hooks = Hook(self._before_forward), Hook(self._after_forward)

    @property
    def memory(self) -> list[Tensor]:
        """The memory of displaced weights, uint8 [bytes] on each device; reallocated when more is needed."""
        return self._scratch.buffers

    @property
    def outside(self) -> list[str]:
        """The names of the weights that are displaced for the whole closure."""
        return sorted(self._outside.values())

    def own_weights(self) -> frozenset[int]:
        """The ids of the modules that own displaced weights, as of the last combination."""
        return frozenset(map(id, self._owners.own))

    def opening(self) -> frozenset[int]:
        """The ids of the modules while which weights of others are not guarded."""
        return frozenset(id(module) for module in self._owners.opened if isinstance(module, SEES_CLASSES))

    def modes(self) -> tuple[tuple[int, bool], ...]:
        """The id and the training mode of each module."""
        return tuple((id(module), module.training) for module in self._modules)

    @contextmanager
    def hooked(self, signals: Signals) -> Iterator[None]:
        """Installs hooks on every module that owns parameters or buffers, within the block.

        The hooks defer ``signals``, so that no module is left partly swapped.
        """
        handles: list[RemovableHandle] = []
        self._signals = signals
        self._modules = list(self._root.modules())
        before, after = self._hooks
        try:
            with self._gathers.hooked(self._modules, signals):
                for module in self._modules:
                    if module._parameters or module._buffers or isinstance(module, SEES_CLASSES):
                        handles.append(module.register_forward_pre_hook(before, prepend=True))
                        handles.append(module.register_forward_hook(after, always_call=True))
                self._owners.check(self._modules)
                self._buffers.forget()  # those of a session that raised
                yield
        finally:
            if self._combination is not None:
                self._end(self._combination)
            for handle in handles:
                handle.remove()

    @contextmanager
    def displaced(
        self, combination: Combination, find_written_buffers: bool, keep_buffers: bool
    ) -> Iterator[set[int]]:
        """Runs modules with displaced weights within the block; yields the ids of the modules that ran.

        With ``find_written_buffers`` every buffer is replaced, and those that a module writes to are
        remembered for later probes. With ``keep_buffers`` their new values are kept for ``take_buffers``.
        """
        self._combination = combination
        self._buffers.begin(find_written_buffers, keep_buffers)
        self._visited = set()
        try:
            self._terms = self._terms_of_modules(combination)
            # Read here, not in the hooks: a dispatch mode that watches operators would see those reads.
            self.originals = {
                id(owner): tensor.data
                for parameters, _ in combination.terms
                for owner, tensor in zip(parameters.owners, parameters.tensors, strict=True)
            }
            if len(combination):
                self._gathers.begin(self._fill, self._owners)
            self._make_room(combination)
            for parameters, terms in combination.terms if len(combination) else ():
                combination.direction.prepare(parameters, terms)
            for tensor in self._outside:
                self._hold(tensor)
            self._guarded = [
                owner
                for parameters, _ in combination.terms
                for owner in parameters.owners
                if len(combination) and id(owner) not in self._swapped
            ]
            self._guard.begin(self._guarded)
            self._count_change(combination)
            yield self._visited
        finally:
            self._end(combination)

    def _end(self, combination: Combination) -> None:
        if self._combination is not combination:  # already ended by the exit of ``hooked``
            return
        for module in reversed(list(self._running)):
            with record(Phase.RESTORE):
                self._restore(module)
        self._guard.release(self._guarded)
        for swapped in self._held:
            swapped.local.data = swapped.original
        self._count_change(combination)
        self._held, self._guarded = [], []
        self._swapped.clear()
        self._combination, self._terms, self.originals = None, {}, {}
        self._gathers.end()

    @staticmethod
    def _count_change(combination: Combination) -> None:
        """Tells modules that keep what they made of their weights, and note the versions, that it is old."""
        if len(combination):
            moving = [owner for parameters, _ in combination.terms for owner in parameters.owners]
            torch.autograd.graph.increment_version(moving)

    def _terms_of_modules(self, combination: Combination) -> dict[nn.Module, list[tuple[Parameters, Terms]]]:
        if not len(combination):
            return {}
        groups = [parameters for parameters, _ in combination.terms]
        if self._owners.update(groups, self._modules, self._gathers.managed):
            places = self._owners.places
            self._outside = {key: name for key, name in self._outside.items() if key in places}
            self._scratch.forget_views()
            self._room = {}
        terms = [terms for _, terms in combination.terms]
        return {
            module: [(parameters, terms[group]) for group, parameters in own]
            for module, own in self._owners.swapped.items()
        }

    def displaced_at(self, tensor: Tensor) -> Tensor | None:
        """The weight in whose displaced copy a tensor lies; None if it lies elsewhere."""
        swapped = list(self._held)
        if self._scratch.holds(tensor):
            swapped += [each for running in self._running.values() for each in running.parameters]
        return next((each.parameter for each in swapped if overlap(each.local, tensor)), None)

    @property
    def held(self) -> frozenset[int]:
        """The ids of the weights that are displaced until the probe ends."""
        return frozenset(id(swapped.parameter) for swapped in self._held)

    def hold(self, parameter: Tensor) -> None:
        """Displaces a weight until the probe ends, now and in later probes: it is read outside its owner."""
        with self._signals.held(), torch.no_grad(), temporarily_clear_interpreter_stack():
            self._outside[id(parameter)] = self._owners.places[id(parameter)][1].names[0]
            self._hold(id(parameter))

    def _hold(self, parameter: int) -> None:
        assert self._combination is not None
        if parameter in self._swapped or not len(self._combination):
            return
        group, parameters = self._owners.places[parameter]
        if parameter in self._gathers.managed:
            displaced = [self._gathers.hold(parameters.owners[0], parameters.tensors[0])]
        else:
            displaced = _like(parameters)
        with record(Phase.PERTURB):
            self._swap_for(parameters, self._combination.terms[group][1], displaced, self._held)

    def _swap_for(
        self, parameters: Parameters, terms: Terms, displaced: list[Tensor], restored: list[_Swapped]
    ) -> None:
        """Fills ``displaced`` and lets the parameters point to it; adds them to ``restored``."""
        self._write(displaced, parameters, terms)
        for owner, replacement in zip(parameters.owners, displaced, strict=True):
            local = shards.local_of(owner)
            restored.append(_Swapped(owner, local, self.originals[id(owner)]))
            self._swapped.add(id(owner))
            local.data = replacement

    def _fill(self, displaced: Sequence[Tensor], parameters: Parameters, group: int) -> None:
        """Fills ``displaced`` with parameters of a group of the combination."""
        assert self._combination is not None
        self._write(displaced, parameters, self._combination.terms[group][1])

    def _write(self, displaced: Sequence[Tensor], parameters: Parameters, terms: Terms) -> None:
        assert self._combination is not None
        self.is_displacing = True
        try:
            self._combination.direction.copy_(displaced, parameters, terms)
        finally:
            self.is_displacing = False

    def _make_room(self, combination: Combination) -> None:
        if self._buffers.finds_written:
            self._scratch.prepare(self._largest(combination))
            return
        key = (combination.seeds.device, len(combination) > 0, self._buffers.count)
        if key not in self._room:
            self._room[key] = self._largest(combination)
        self._scratch.prepare(self._room[key])

    def _largest(self, combination: Combination) -> dict[torch.device, int]:
        """The bytes of the largest module on each device."""
        largest = {combination.seeds.device: 0, **self._gathers.largest()}
        for module, terms in self._terms.items():
            own: dict[torch.device, int] = {}
            weights = [tensor for parameters, _ in terms for tensor in parameters.tensors]
            for tensor in weights + [buffer for _, buffer in self._buffers.of(module)]:
                own[tensor.device] = own.get(tensor.device, 0) + aligned_bytes(tensor)
            for device, size in own.items():
                largest[device] = max(largest.get(device, 0), size)
        return largest

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if self._combination is None:  # between two probes
            return
        _check_no_transform()
        with self._signals.held():
            if module in self._running:  # a recursive call: its weights are already displaced
                self._running[module].depth += 1
            else:
                self._before(module, args)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        with self._signals.held():
            return self._after(module, output)

    def _before(self, module: nn.Module, args: Any) -> None:
        users = self._scratch.users()
        running = self._running[module] = _Running(self._scratch.top, users)
        self._guard.release(self._owners.opened.get(module, ()))
        self._visited.add(id(module))
        running.rows = self._rows_to_read(module, args)
        if running.rows is None:
            with record(Phase.PERTURB):
                self._displace(module, running)

    def _displace(self, module: nn.Module, running: _Running) -> None:
        if module in self._terms and (name := self._owners.replaced(module)):
            raise StreamedProbeError(
                f"streamed probe: {name} was gathered by an FSDPModule that is no part of the model of the "
                "optimizer, so it was not displaced; pass the whole model, to which fully_shard was applied"
            )
        # Derivatives of the model read its weights again, after this forward.
        hold = torch.is_grad_enabled()
        for parameters, terms in self._terms.get(module, ()):
            fresh = self._not_yet_displaced(parameters)
            if not len(fresh):
                continue
            if hold:
                displaced = _like(fresh)
            elif fresh is parameters:
                displaced = self._scratch.take_again(fresh)
            else:
                displaced = self._scratch.take(fresh.tensors)
            self._swap_for(fresh, terms, displaced, self._held if hold else running.parameters)
        if module._buffers:
            running.buffers = self._buffers.swap(module, self._scratch)

    def _not_yet_displaced(self, parameters: Parameters) -> Parameters:
        """Leaves out weights that a running parent shares, or that are displaced until the probe ends."""
        fresh = [i for i, owner in enumerate(parameters.owners) if id(owner) not in self._swapped]
        return parameters if len(fresh) == len(parameters) else parameters.take(fresh)

    def _after(self, module: nn.Module, output: Any) -> Any:
        running = self._running.get(module)
        if running is None:  # an error was raised before its forward began
            return None
        running.depth -= 1
        if running.depth:
            return None
        if running.rows is not None and output is not None:
            with record(Phase.PERTURB):
                assert self._combination is not None
                _rows.displace(running.rows, output, self._terms[module], self._combination.direction)
        # The output may be a view of the displaced weights, whose memory the next module will reuse.
        if isinstance(output, Tensor):
            borrowed = [output] if self._scratch.holds(output) else []
        else:
            borrowed = distinct(output, self._scratch.holds)
        if borrowed:
            output = tree_map(lambda value: value.clone() if self._scratch.holds(value) else value, output)
        with record(Phase.RESTORE):
            self._restore(module)
        has_raised = output is None and sys.exc_info()[0] is not None  # then views live on in the traceback
        if has_raised or torch.is_grad_enabled():
            return output if borrowed else None
        if self._scratch.users() > running.users + len(borrowed):
            names = ", ".join(
                name for parameters, _ in self._terms.get(module, ()) for name in parameters.names
            )
            raise StreamedProbeError(
                f"streamed probe: a view of {names or 'a buffer'} outlives the forward of the module that "
                "owns it, and would later show other weights. Pass probe='inplace', or keep a copy instead "
                "of a view."
            )
        return output if borrowed else None

    def _rows_to_read(self, module: nn.Module, args: Any) -> list[int] | None:
        # The watch would report the reads of rows from the original table.
        if type(module) is not nn.Embedding or self._buffers.finds_written:
            return None
        is_swapped = id(module.weight) in self._swapped
        return None if is_swapped else _rows.to_read(module, args, self._terms.get(module, []))

    def _restore(self, module: nn.Module) -> None:
        """Restores weights and buffers; may be called again if an interrupt cut it short."""
        running = self._running[module]
        for swapped in running.parameters:
            swapped.local.data = swapped.original
            self._swapped.discard(id(swapped.parameter))
        self._buffers.restore(module, running.buffers, self._scratch)
        if self._guarded and (opened := self._owners.opened.get(module)):
            if self._swapped:
                opened = [parameter for parameter in opened if id(parameter) not in self._swapped]
            self._guard.guard(opened)
        del self._running[module]
        self._scratch.release(running.top)

    def take_buffers(self) -> Callable[[Tensor], None]:
        """Hands over the values that ``keep_buffers`` kept; see ``Session.take_buffers``."""
        return self._buffers.take()


def _like(parameters: Parameters) -> list[Tensor]:
    return [empty_like(tensor) for tensor in parameters.tensors]


def _check_no_transform() -> None:
    """Raises within a transform of torch.func, whose tensors do not show weights that are swapped."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise StreamedProbeError(
            "streamed probe: the closure runs the model inside a transform of torch.func (grad, vmap, jvp, "
            "...), which does not see swapped weights. Pass probe='inplace', or use torch.autograd.grad"
        )
