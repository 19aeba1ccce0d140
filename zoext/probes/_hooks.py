"""Forward hooks that belong to one module, and not to its copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Hook:
    """A forward hook, or pre-hook, that Dynamo does not trace and whose copies do nothing.

    A closure may copy or pickle the model while hooks are installed. Register the same object in all
    sessions, since Dynamo compiles again for others.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        if not hasattr(Hook.__call__, "_torchdynamo_disable"):
            # Not when this module is imported, since it imports Dynamo, as building an optimizer does later.
            Hook.__call__ = torch.compiler.disable(Hook.__call__)  # type: ignore[method-assign]

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[Callable[..., None]]]:
        return Hook, (_do_nothing,)


def _do_nothing(*arguments: Any) -> None:
    """The function of hooks that were copied."""


def registered(module: nn.Module, hooks: tuple[Hook, Hook]) -> list[RemovableHandle]:
    """Registers hooks around the forward of a module, outside of those that it has."""
    before, after = hooks
    return [
        module.register_forward_pre_hook(before, prepend=True),
        module.register_forward_hook(after, always_call=True),
    ]
