"""Replaces the weights of a module while it runs, and restores them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils.hooks import RemovableHandle

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._runtime.interrupts import Signals
from zoext._runtime.profiling import Phase, record
from zoext.directions import Combination, Terms
from zoext.probes import _rows
from zoext.probes._buffers import BufferSwap
from zoext.probes._gathers import GatherSwap
from zoext.probes._groups import Group, Groups, Holder
from zoext.probes._hooks import Hook, registered
from zoext.probes._memory import overlap
from zoext.probes._owners import SEES_CLASSES, Owners
from zoext.probes._reads import ReadGuard
from zoext.probes._running import Running, Swapped, check_no_transform
from zoext.probes._scratch import Scratch, bytes_of, empty_like


class ModuleSwap:
    """Swaps weights with hooks on ``root`` and the modules below it that own parameters or buffers."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules: list[nn.Module] = []  # as of the beginning of the session
        self._signals = Signals()
        self._scratch = Scratch()
        self._buffers = BufferSwap()
        self._gathers = GatherSwap(self._scratch)
        self._groups = Groups()
        self._running: dict[Holder, Running] = {}
        self._room: dict[tuple[torch.device, bool, int], dict[torch.device, int]] = {}
        self._guard = ReadGuard(self.hold)
        self._guarded: list[Tensor] = []  # until the probe ends: weights that move
        self._held: list[Swapped] = []  # until the probe ends
        self._outside: dict[int, str] = {}  # the names of weights to hold, since they are read elsewhere
        self._owners = Owners()
        self._swapped: set[int] = set()
        self.originals: dict[int, Tensor] = {}  # of weights that are displaced, by their ids
        self._terms: dict[Holder, list[tuple[Parameters, Terms]]] = {}
        self._combination: Combination | None = None
        self._visited: set[int] = set()
        self.is_displacing = False  # reading the originals, to make the displaced weights of them
        self._hooks = Hook(self._before_forward), Hook(self._after_forward)
        self._group_hooks = Hook(self._before_group), Hook(self._after_group)

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
    def hooked(self, signals: Signals, find_groups: bool = False) -> Iterator[None]:
        """Installs hooks on every module that owns parameters or buffers, within the block.

        The hooks defer ``signals``, so that no module is left partly swapped. With ``find_groups``, a watched
        probe finds modules whose weights later ones displace together.
        """
        handles: list[RemovableHandle] = []
        self._signals = signals
        self._modules = list(self._root.modules())
        try:
            with self._gathers.hooked(self._modules, signals):
                for module in self._modules:
                    if module._parameters or module._buffers or isinstance(module, SEES_CLASSES):
                        handles += registered(module, self._hooks)
                handles += self._groups.watch(self._modules if find_groups else [])
                for group in self._groups:
                    handles += registered(group.container, self._group_hooks)
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
            self._terms = self._terms_of_holders(combination)
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
            if self._groups.are_watched and find_written_buffers and len(combination):
                self._find_groups()
        finally:
            self._end(combination)

    def _end(self, combination: Combination) -> None:
        if self._combination is not combination:  # already ended by the exit of ``hooked``
            return
        for holder in reversed(list(self._running)):
            with record(Phase.RESTORE):
                self._restore(holder)
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

    def _terms_of_holders(self, combination: Combination) -> dict[Holder, list[tuple[Parameters, Terms]]]:
        if not len(combination):
            return {}
        groups = [parameters for parameters, _ in combination.terms]
        if self._owners.update(groups, self._modules, self._gathers.managed):
            places = self._owners.places
            self._outside = {key: name for key, name in self._outside.items() if key in places}
            self._scratch.forget()
            self.forget_groups()
        terms = [terms for _, terms in combination.terms]
        holders: dict[Holder, list[tuple[int, Parameters]]] = dict(self._owners.swapped.items())
        holders.update((group, group.own) for group in self._groups)
        return {holder: [(part, terms[number]) for number, part in own] for holder, own in holders.items()}

    def forget_groups(self) -> None:
        """Displaces the weights of each module by themselves, until groups are found again."""
        self._groups.forget()
        self._scratch.forget_views()
        self._room = {}

    def _find_groups(self) -> None:
        self.forget_groups()
        if not self._gathers.managed and not self._owners.sharded:
            self._groups.find(self._root, self._owners, self._buffers.written_by, self._outside)

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
            displaced = [empty_like(tensor) for tensor in parameters.tensors]
        with record(Phase.PERTURB):
            self._swap_for(parameters, self._combination.terms[group][1], displaced, self._held)

    def _swap_for(
        self, parameters: Parameters, terms: Terms, displaced: list[Tensor], restored: list[Swapped]
    ) -> None:
        """Fills ``displaced`` and lets the parameters point to it; adds them to ``restored``."""
        self._write(displaced, parameters, terms)
        for owner, replacement in zip(parameters.owners, displaced, strict=True):
            local = shards.local_of(owner)
            restored.append(Swapped(owner, local, self.originals[id(owner)]))
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
        largest = self._gathers.largest()
        for holder, terms in self._terms.items():
            buffers = self._buffers.of(holder) if isinstance(holder, nn.Module) else []
            weights = [tensor for parameters, _ in terms for tensor in parameters.tensors]
            largest |= bytes_of(weights + [buffer for _, buffer in buffers])
        return {combination.seeds.device: 0, **largest}

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if self._combination is None:  # between two probes
            return
        self._visited.add(id(module))
        check_no_transform()
        with self._signals.held():
            if (group := self._displaced_by(module)) is not None:
                if torch.is_grad_enabled():
                    self._keep(module, self._running[group])
                return
            if (running := self._begin(module, self._owners.opened.get(module, ()))) is None:
                return
            # The watch would report the reads of rows from the original table.
            if type(module) is nn.Embedding and not self._buffers.finds_written:
                running.rows = _rows.to_read(module, args, self._terms.get(module, []), self._swapped)
            if running.rows is not None:
                return
            self._owners.check_shards(module)
            with record(Phase.PERTURB):
                self._displace(module, running)
                if module._buffers:
                    running.buffers = self._buffers.swap(module, self._scratch)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if module in self._running:
            with self._signals.held():
                return self._after(module, output)
        # A group displaced it, or an error was raised before it began.
        output, borrowed = self._scratch.returned(output)
        return output if borrowed else None

    def _displaced_by(self, module: nn.Module) -> Group | None:
        """The running group that has displaced all weights of a module, if it has nothing else to swap."""
        if module in self._running or (module._buffers and self._buffers.of(module)):
            return None
        return next((group for group in self._groups.of(module) if group in self._running), None)

    def _keep(self, module: nn.Module, running: Running) -> None:
        """Keeps weights that a group displaced until the probe ends: derivatives read them again."""
        own = {id(owner) for parameters, _ in self._terms.get(module, ()) for owner in parameters.owners}
        for swapped in (each for each in running.parameters if id(each.parameter) in own):
            self._held.append(swapped)
            swapped.local.data = swapped.local.data.clone()
        running.parameters = [swapped for swapped in running.parameters if id(swapped.parameter) not in own]

    def _before_group(self, container: nn.Module, args: Any) -> None:
        group = self._groups.at(container)
        if self._combination is None or group is None or self._buffers.finds_written:  # then it is watched
            return
        check_no_transform()
        with self._signals.held():
            if (running := self._begin(group, group.opened)) is not None:
                with record(Phase.PERTURB):
                    self._displace(group, running)

    def _after_group(self, container: nn.Module, args: Any, output: Any) -> Any:
        group = self._groups.at(container)
        if group is None or group not in self._running:
            return None
        with self._signals.held():
            return self._after(group, output)

    def _begin(self, holder: Holder, opened: Sequence[Tensor]) -> Running | None:
        """Notes that a forward begins; None for a recursive one, whose weights are already displaced."""
        if holder in self._running:
            self._running[holder].depth += 1
            return None
        running = self._running[holder] = Running(self._scratch.top, self._scratch.users())
        self._guard.release(opened)
        return running

    def _displace(self, holder: Holder, running: Running) -> None:
        # Derivatives of the model read its weights again, after this forward.
        hold = torch.is_grad_enabled()
        for parameters, terms in self._terms.get(holder, ()):
            fresh = self._not_yet_displaced(parameters)
            if not len(fresh):
                continue
            if hold:
                displaced = [empty_like(tensor) for tensor in fresh.tensors]
            elif fresh is parameters:
                displaced = self._scratch.take_again(fresh)
            else:
                displaced = self._scratch.take(fresh.tensors)
            self._swap_for(fresh, terms, displaced, self._held if hold else running.parameters)

    def _not_yet_displaced(self, parameters: Parameters) -> Parameters:
        """Leaves out weights that a running parent shares, or that are displaced until the probe ends."""
        fresh = [i for i, owner in enumerate(parameters.owners) if id(owner) not in self._swapped]
        return parameters if len(fresh) == len(parameters) else parameters.take(fresh)

    def _after(self, holder: Holder, output: Any) -> Any:
        running = self._running[holder]
        running.depth -= 1
        if running.depth:
            return None
        if running.rows is not None and output is not None:
            with record(Phase.PERTURB):
                assert self._combination is not None
                _rows.displace(running.rows, output, self._terms[holder], self._combination.direction)
        # The output may be a view of the displaced weights, whose memory the next module will reuse.
        output, borrowed = self._scratch.returned(output)
        with record(Phase.RESTORE):
            self._restore(holder)
        has_raised = output is None and sys.exc_info()[0] is not None  # then views live on in the traceback
        if has_raised or torch.is_grad_enabled():
            return output if borrowed else None
        names = (name for parameters, _ in self._terms.get(holder, ()) for name in parameters.names)
        running.check_views(self._scratch.users, borrowed, names)
        return output if borrowed else None

    def _restore(self, holder: Holder) -> None:
        """Restores weights and buffers; may be called again if an interrupt cut it short."""
        running = self._running[holder]
        for swapped in running.parameters:
            swapped.local.data = swapped.original
            self._swapped.discard(id(swapped.parameter))
        if isinstance(holder, Group):
            opened = holder.opened
        else:
            self._buffers.restore(holder, running.buffers, self._scratch)
            opened = self._owners.opened.get(holder, [])
        if self._guarded and opened:
            if self._swapped:
                opened = [parameter for parameter in opened if id(parameter) not in self._swapped]
            self._guard.guard(opened)
        del self._running[holder]
        self._scratch.release(running.top)

    def take_buffers(self) -> Callable[[Tensor], None]:
        """Hands over the values that ``keep_buffers`` kept; see ``Session.take_buffers``."""
        return self._buffers.take()
