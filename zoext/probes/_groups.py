"""Modules whose weights are displaced together, when a module that contains them runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zoext._parameters.parameters import Parameters
from zoext.probes._hooks import Hook, registered
from zoext.probes._owners import SEES_CLASSES, Owners
from zoext.probes._scratch import bytes_of

#: Bytes of the weights of a group at most: what stays in a cache until it is read, and enough to fill a GPU.
MOST = {"cpu": 2**23, "cuda": 2**26}


class Group:
    """The weights below a container that are displaced in one operator call.

    Attributes:
        container: the module in whose forward they are displaced.
        own: the parameters, with the index of their parameter group.
        opened: the same weights, which may be read while the container runs.
    """

    def __init__(self, container: nn.Module, own: list[tuple[int, Parameters]]) -> None:
        self.container = container
        self.own = own
        self.opened = [owner for _, parameters in own for owner in parameters.owners]


#: What is swapped together, while a module runs.
Holder: TypeAlias = nn.Module | Group


class Nesting:
    """Which modules ran inside which others."""

    def __init__(self) -> None:
        self._stack: list[nn.Module] = []
        self._runs: Counter[nn.Module] = Counter()
        self._inside: dict[nn.Module, Counter[nn.Module]] = {}

    def enter(self, module: nn.Module, args: Any) -> None:
        """A pre-hook of all modules."""
        for container in self._stack:
            self._inside.setdefault(container, Counter())[module] += 1
        self._runs[module] += 1
        self._stack.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook of all modules."""
        if self._stack and self._stack[-1] is module:
            self._stack.pop()

    def always_runs(self, container: nn.Module, module: nn.Module) -> bool:
        """Whether a module ran at least once in each forward of a container."""
        return 0 < self._runs[container] <= self._inside.get(container, Counter())[module]


class Groups:
    """The groups of a model, empty until forwards have shown which modules run together.

    Displacing a weight takes about as long on the host as a small layer computes, and one call for the
    weights of a decoder layer takes little longer than one for a single weight. A group is never larger than
    the largest module, so that it needs no more scratch memory.
    """

    def __init__(self) -> None:
        self._groups: dict[nn.Module, Group] = {}  # by their containers
        self._of: dict[nn.Module, list[Group]] = {}  # by the modules that own the weights
        self._nesting: Nesting | None = None

    @property
    def are_watched(self) -> bool:
        """Whether hooks note which modules run inside which others."""
        return self._nesting is not None

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def at(self, container: nn.Module) -> Group | None:
        """The group that is displaced when a module runs."""
        return self._groups.get(container)

    def of(self, module: nn.Module) -> list[Group]:
        """The groups with all weights of a module."""
        return self._of.get(module, [])

    def forget(self) -> None:
        """Dissolves all groups."""
        self._groups, self._of = {}, {}

    def watch(self, modules: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Registers hooks that note which of the modules run inside which others, for ``find``."""
        self._nesting = nesting = Nesting() if modules else None
        if nesting is None:
            return []
        hooks = Hook(nesting.enter), Hook(nesting.leave)
        # Hooks on an embedding would have it displace its table, as its rows may be read by them.
        watched = (module for module in modules if not isinstance(module, nn.Embedding))
        return [handle for module in watched for handle in registered(module, hooks)]

    def find(self, root: nn.Module, owners: Owners, apart: Collection[int]) -> None:
        """Makes the largest groups of modules that always run inside their container, if they were watched.

        ``apart`` has the ids of the weights that are displaced otherwise.
        """
        nesting, self._nesting = self._nesting, None
        self.forget()
        if nesting is None:
            return
        sizes = {
            module: bytes_of(tensor for _, parameters in own for tensor in parameters.tensors)
            for module, own in owners.swapped.items()
        }
        largest: Counter[torch.device] = Counter()
        for size in sizes.values():
            largest |= size
        for container in _containers(root, sizes, largest, nesting):
            below = [module for module in container.modules() if module in sizes]
            ids = {
                id(owner): None
                for module in below
                for _, part in owners.swapped[module]
                for owner in part.owners
            }
            group = Group(container, owners.take(key for key in ids if key not in apart))
            self._groups[container] = group
            for module in below:
                self._of.setdefault(module, []).append(group)


def _containers(
    root: nn.Module,
    sizes: dict[nn.Module, Counter[torch.device]],
    largest: Counter[torch.device],
    nesting: Nesting,
) -> Iterator[nn.Module]:
    """The outermost modules whose weights fit into the memory of a group."""
    waiting, seen = [root], {root}
    while waiting:
        container = waiting.pop()
        below = [module for module in container.modules() if module in sizes]
        if len(below) > 1 and _fits(container, below, sizes, largest, nesting):
            yield container
            continue
        if isinstance(container, SEES_CLASSES):
            continue
        fresh = [module for module in container.children() if module not in seen]
        seen.update(fresh)
        waiting += fresh


def _fits(
    container: nn.Module,
    below: list[nn.Module],
    sizes: dict[nn.Module, Counter[torch.device]],
    largest: Counter[torch.device],
    nesting: Nesting,
) -> bool:
    # An embedding displaces the rows it reads instead of its table.
    if any(isinstance(module, nn.Embedding) for module in below):
        return False
    if any(isinstance(module, SEES_CLASSES) for module in container.modules()):
        return False
    size: Counter[torch.device] = Counter()
    for module in below:
        size += sizes[module]
    if any(size[device] > min(largest[device], MOST.get(device.type, 2**26)) for device in size):
        return False
    return all(module is container or nesting.always_runs(container, module) for module in below)
