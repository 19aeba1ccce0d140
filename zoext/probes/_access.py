"""Sees that the weights of a module are asked for while it does not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class AccessWatch:
    """Replaces the ``_parameters`` of modules by dicts that note who is asked outside its forward.

    An access is not yet a read of values (``next(model.parameters()).device``), but there is no read of a
    parameter without one, unless somebody holds the parameter. It costs 0.1 us, where a look at every
    operator costs as much as many operators.

    Attributes:
        seen: the ids of the modules that were asked since it was cleared.
        is_active: whether accesses are noted.
    """

    def __init__(self, is_running: Callable[[nn.Module], bool]) -> None:
        self._is_running = is_running
        self.seen: set[int] = set()
        self.is_active = False

    @contextmanager
    def installed(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Watches ``modules`` within the block, except scripted ones."""
        replaced: list[tuple[nn.Module, dict[str, Any], _NotingDict]] = []
        try:
            for module in modules:
                own = module._parameters
                if not own or isinstance(module, torch.jit.ScriptModule):  # whose parameters are no dict
                    continue
                noting = _NotingDict(own)
                noting.note = self._noting(module)
                replaced.append((module, own, noting))
                module.__dict__["_parameters"] = noting
            yield
        finally:
            for module, own, noting in replaced:
                if module.__dict__["_parameters"] is noting:
                    now = dict(noting)
                    # Not by ==, which would compare the values of tensors.
                    if [*map(id, now), *map(id, now.values())] != [*map(id, own), *map(id, own.values())]:
                        own.clear()
                        own.update(now)
                    module.__dict__["_parameters"] = own

    def _noting(self, module: nn.Module) -> Callable[[], None]:
        key = id(module)

        def note() -> None:
            # Dynamo would guard on what follows, and compile the forward of every module apart.
            if torch.compiler.is_compiling():
                return
            if self.is_active and key not in self.seen and not self._is_running(module):
                self.seen.add(key)

        return note


class _NotingDict(dict[str, Any]):
    """A dict that calls ``note`` when values are asked for."""

    note: Callable[[], None]

    def __getitem__(self, key: str) -> Any:
        self.note()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.note()
        return super().get(key, default)

    def items(self) -> Any:
        self.note()
        return super().items()

    def values(self) -> Any:
        self.note()
        return super().values()

    def __reduce__(self) -> Any:
        """Copies of a module have a plain dict."""
        return dict, (dict(super().items()),)
