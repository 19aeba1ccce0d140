"""What a closure does that a graph, which does not run its Python code again, would fix for ever."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from zoext.randomness import RandomState

#: Larger lists and dictionaries are data sets, not batches; nobody is to look through them at every step.
LARGEST_BATCH = 64


def capturable(closure: Callable[[], Any], device: torch.device) -> Callable[[], Tensor]:
    """The closure, which raises if its value or its randomness could not be replayed."""

    def run() -> Tensor:
        before = RandomState(device)
        loss = closure()
        if read := before.read_since():
            raise RuntimeError(
                f"closure drew random numbers from {' and '.join(read)}, which a graph would not draw anew "
                "for each step and alike for its probes; switch dropout off with model.eval(), or step "
                "with optimizer.step(closure)"
            )
        if not isinstance(loss, Tensor) or loss.device != device:
            given = f"one on {loss.device}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(
                f"closure must return a tensor on {device}, not {given}: a graph cannot run Python code "
                "again; compute the loss on the device, or step with optimizer.step(closure)"
            )
        return loss

    return run


class Bindings:
    """What a closure's own variables are bound to: addresses of tensors, and plain numbers and strings.

    Variables that it reads through other functions, and attributes, are not followed.
    """

    def __init__(self, closure: Callable[[], Any]) -> None:
        function = getattr(closure, "__func__", closure)
        self._function = function if isinstance(function, FunctionType) else None
        self._globals = sorted(set(_global_names(self._function.__code__))) if self._function else []
        self._known = self._look()

    def rebound(self) -> list[str]:
        """The names of variables that are bound to something else since this was made."""
        now = self._look()
        return [name for name, known in self._known.items() if now[name] != known]

    def _look(self) -> dict[str, Any]:
        function = self._function
        if function is None:
            return {}
        bound = {name: function.__globals__.get(name) for name in self._globals}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                bound[name] = cell.cell_contents
            except ValueError:  # not bound yet
                bound[name] = None
        bound |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
        bound |= function.__kwdefaults__ or {}
        return {name: _fixed(value) for name, value in bound.items()}


def _global_names(code: CodeType) -> Iterator[str]:
    # Not co_names, which has the names of attributes too.
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _fixed(value: object) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr(), tuple(value.shape), value.dtype
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and len(value) <= LARGEST_BATCH:
        return {str(key): _fixed(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple) and len(value) <= LARGEST_BATCH:
        return [_fixed(entry) for entry in value]
    return None
