"""Hooks by which whoever looks at the weights of a model has held steps written to them first."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Set
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Holder(Protocol):
    """Something that holds steps back."""

    def look_at(self, *, loads: bool) -> None:
        """Called before weights are read or, with ``loads``, replaced by those of a checkpoint."""

    def copied(self, copies: dict[int, Any]) -> None:
        """Called while a model is copied; ``copies`` has those so far, by the ids of the originals."""

    def pickled(self, *, is_late: bool) -> None:
        """Called while a model is pickled; if ``is_late``, some of its weights have been already."""


class Hooks:
    """Hooks on the modules that own some weights, and on all modules above those.

    A parent may read the weights of its children itself, and so may the hooks of a user: ours come first.
    """

    def __init__(self) -> None:
        self._look, self._own, self._load = _Hook(), _Hook(owns=True), _Hook(loads=True)
        self._of_forwards: list[RemovableHandle] = []
        # These stay, and do nothing while nothing is held: torch loops over them as they call us.
        self._with_state: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the holder has none installed."""
        return Hooks, ()

    def install(self, holder: Holder, root: nn.Module, owned: Set[int]) -> None:
        """Has ``holder`` called, for the weights in ``root`` with the ids ``owned``."""
        self.remove()
        for module, owns in _holders(root, owned):
            hook = self._own if owns else self._look
            self._of_forwards.append(module.register_forward_pre_hook(hook, prepend=True))
            if module not in self._with_state:
                _put_first(module.register_state_dict_pre_hook(self._look))
                _put_first(module.register_load_state_dict_pre_hook(self._load))
                self._with_state.add(module)
        self._look.holder = self._own.holder = self._load.holder = holder

    def silence(self) -> None:
        """Has nobody called, and leaves the hooks where they are: a copy in progress loops over them."""
        self._look.holder = self._own.holder = self._load.holder = None

    def remove(self) -> None:
        """Has nobody called."""
        self.silence()
        for handle in self._of_forwards:
            handle.remove()
        self._of_forwards = []


class _Hook:
    """Belongs to one model: a copy of the model has the steps, and a hook that does nothing.

    Args:
        owns: whether the module that is called owns some of the weights.
        loads: whether a state is loaded into it.
    """

    __slots__ = ("__weakref__", "_loads", "_owns", "holder")

    def __init__(self, *, owns: bool = False, loads: bool = False) -> None:
        self.holder: Holder | None = None  # none is kept alive by a model from which it holds nothing back
        self._owns, self._loads = owns, loads
        if not hasattr(_Hook.__call__, "_torchdynamo_disable"):
            # Not when this module is imported, since it imports Dynamo, as building an optimizer does later.
            _Hook.__call__ = torch.compiler.disable(_Hook.__call__)  # type: ignore[method-assign]

    def __call__(self, *_: Any) -> None:
        if self.holder is not None:
            self.holder.look_at(loads=self._loads)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        if self.holder is not None:
            self.holder.copied(memo)
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a function of the standard library, so that zoext is not needed to load the model."""
        if self.holder is not None:
            self.holder.pickled(is_late=self._owns)
        return getattr, (nullcontext(), "__exit__")


def _put_first(handle: RemovableHandle) -> None:
    if (hooks := handle.hooks_dict_ref()) is not None:
        hooks.move_to_end(handle.id, last=False)


def _holders(root: nn.Module, owned: Set[int]) -> list[tuple[nn.Module, bool]]:
    """The modules that own a weight or are above one, and whether they own one."""
    found: dict[nn.Module, tuple[bool, bool]] = {}

    def holds(module: nn.Module) -> bool:
        if module not in found:
            found[module] = (False, False)  # of a module that contains itself
            owns = not owned.isdisjoint(map(id, module.parameters(recurse=False)))
            below = [holds(child) for child in module.children()]
            found[module] = (owns or any(below), owns)
        return found[module][0]

    holds(root)
    return [(module, owns) for module, (is_above, owns) in found.items() if is_above]
