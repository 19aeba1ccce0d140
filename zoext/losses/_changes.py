"""Notices what happens to a model after ``CompactLoss`` has compared itself with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from zoext.losses._heads import Settings
from zoext.losses._refusals import CompactLossError


class Comparison:
    """What the loss of a whole model depends on, beside the parts that ``CompactLoss`` runs.

    Args:
        model: the whole model, with wrappers of processes.
        core: the model of transformers in it.
    """

    def __init__(self, model: nn.Module, core: Any) -> None:
        self._core = core
        self._settings = Settings(core)
        self._left_out = list(_around(model, core))
        self._compared = self._state()

    def check(self) -> None:
        """Raises a CompactLossError if the whole model may have another loss than when it was compared."""
        state = self._state()
        for what in {**self._compared, **state}:
            if state.get(what) != self._compared.get(what):
                raise CompactLossError(
                    f"{what} of the model changed after CompactLoss had compared its loss with that of the "
                    "model, whose parts it runs; build it again, or use the loss of the model"
                )

    def _state(self) -> dict[str, Any]:
        settings = {f"config.{name}": value for name, value in self._settings.unread().items()}
        forwards = [(type(module).forward, vars(module).get("forward")) for module in self._left_out]
        hooks = [
            hook
            for module in self._left_out
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            if not _is_own(hook)
        ]
        return {
            **settings,
            "the loss_function": getattr(self._core, "loss_function", None),
            "the forward": [(of_class, None if _is_own(own) else own) for of_class, own in forwards],
            "a forward hook": hooks,
        }


def _around(module: nn.Module, core: nn.Module) -> Iterator[nn.Module]:
    """The modules around ``core``, from the outside, and ``core`` itself."""
    while module is not core:
        yield module
        within = (child for child in module.children() if any(part is core for part in child.modules()))
        module = next(within, core)
    yield core


def _is_own(function: object) -> bool:
    """Whether it belongs to a probe or a direction, which install theirs for a step or a forward."""
    return str(getattr(function, "__module__", "")).startswith("zoext.")
