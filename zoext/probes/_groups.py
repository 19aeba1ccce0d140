"""Modules whose weights are displaced together, when a module that contains them runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
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
        self._running: list[tuple[nn.Module, set[nn.Module]]] = []
        self._always: dict[nn.Module, set[nn.Module]] = {}
        self._around: dict[nn.Module, set[nn.Module]] = {}

    def enter(self, module: nn.Module, args: Any) -> None:
        """A pre-hook of all modules."""
        for _, inside in self._running:
            inside.add(module)
        self._around.setdefault(module, set()).update(container for container, _ in self._running)
        self._running.append((module, set()))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook of all modules."""
        if self._running and self._running[-1][0] is module:
            inside = self._running.pop()[1]
            self._always[module] = self._always.get(module, inside) & inside

    def always_inside(self, container: nn.Module) -> Set[nn.Module]:
        """The modules that ran in each forward of a container."""
        return self._always.get(container, set())

    def around(self, module: nn.Module) -> Set[nn.Module]:
        """The modules in some of whose forwards a module ran."""
        return self._around.get(module, set())


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

    def find(
        self,
        root: nn.Module,
        owners: Owners,
        written: Callable[[nn.Module], Sequence[Tensor]],
        apart: Collection[int],
    ) -> None:
        """Makes the largest groups of modules that always run inside their container, if they were watched.

        ``written`` returns the buffers that a module writes. ``apart`` has the ids of the weights that are
        displaced otherwise.
        """
        nesting, self._nesting = self._nesting, None
        self.forget()
        if nesting is None:
            return
        search = _Search(owners, nesting, written)
        for container, below in search.containers(root):
            parameters = [part for module in below for _, part in owners.swapped[module]]
            ids = dict.fromkeys(id(owner) for part in parameters for owner in part.owners)
            group = Group(container, owners.take(key for key in ids if key not in apart))
            self._groups[container] = group
            for module in below:
                self._of.setdefault(module, []).append(group)


class _Search:
    """The containers whose weights are displaced together."""

    def __init__(
        self, owners: Owners, nesting: Nesting, written: Callable[[nn.Module], Sequence[Tensor]]
    ) -> None:
        self._nesting, self._written = nesting, written
        self._sizes = {
            module: bytes_of(tensor for _, parameters in own for tensor in parameters.tensors)
            for module, own in owners.swapped.items()
        }
        self._largest: Counter[torch.device] = Counter()
        for size in self._sizes.values():
            self._largest |= size

    def containers(self, root: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """The outermost modules that fit, each with the modules below it, or it, that own weights."""
        waiting, seen = [root], {root}
        while waiting:
            container = waiting.pop()
            below = [module for module in container.modules() if module in self._sizes]
            if len(below) > 1 and self._fits(container, below):
                yield container, below
            elif not isinstance(container, SEES_CLASSES):
                fresh = [module for module in container.children() if module not in seen]
                seen.update(fresh)
                waiting += fresh

    def _fits(self, container: nn.Module, below: list[nn.Module]) -> bool:
        parts = list(container.modules())
        # An embedding displaces the rows it reads instead of its table.
        if any(isinstance(module, (nn.Embedding, *SEES_CLASSES)) for module in parts):
            return False
        if not set(below) - {container} <= self._nesting.always_inside(container):
            return False
        size = bytes_of(buffer for module in parts for buffer in self._written(module))
        # The weights of modules around it are in the same memory.
        for module in {*below, *self._nesting.around(container)} & self._sizes.keys():
            size += self._sizes[module]
        return all(
            size[device] <= min(self._largest[device], MOST.get(device.type, 2**26)) for device in size
        )
