"""The forward that takes the place of a module's own while a closure runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from zoext.probes._batched.errors import BatchedProbeError


class Replaced:
    """The forward of one module while it is replaced; copies of the module would run the original's.

    Attributes:
        original: what the module had in its ``__dict__`` before, as hooks of Accelerate put there.
    """

    __slots__ = ("_module", "_name", "_run", "original")

    def __init__(
        self,
        run: Callable[..., Any],
        original: Callable[..., Any] | None,
        module: nn.Module,
        name: Callable[[nn.Module], str],
    ) -> None:
        self._run = run
        self.original = original
        self._module = module
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise BatchedProbeError(
            f"the closure copies {self._name(self._module)}, and a copy would not be displaced"
        )

    def __reduce__(self) -> NoReturn:
        raise BatchedProbeError(
            f"the closure pickles {self._name(self._module)}, and a copy would not be displaced"
        )


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """A forward that was assigned to the module itself, in place of that of its class; None if none was."""
    found: Callable[..., Any] | Replaced | None = module.__dict__.get("forward")
    return found.original if isinstance(found, Replaced) else found
