"""The tensors that a closure reads; a graph keeps reading them at their addresses from the capture."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

#: Larger lists and dictionaries are treated as data sets, not batches.
_LARGEST_BATCH = 64

_EMPTY = CellType()  # the cell of a variable that is not bound yet


class StaticInputs:
    """The tensors and modules to which the variables of a closure are bound.

    The variables are the globals that the closure reads, its free variables, its defaults, and the arguments
    of a ``functools.partial``. Entries of lists and dictionaries are included, attributes of objects are not.
    """

    def __init__(self, closure: Callable[[], Any]) -> None:
        self._closure = closure
        self._globals = _global_names(closure)
        variables = dict(_variables(closure, self._globals))
        self.modules = [value for value in variables.values() if isinstance(value, nn.Module)]
        self._known = _places(variables)

    def rebound(self) -> list[str]:
        """The names of variables that hold different tensors than when this object was created."""
        now = _places(dict(_variables(self._closure, self._globals)))
        return [name for name in self._known.keys() | now.keys() if self._known.get(name) != now.get(name)]


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """The address and layout at which a captured kernel keeps reading ``tensor``."""
    if tensor.layout != torch.strided:
        return id(tensor), tensor.shape, tensor.dtype
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _function_of(closure: Any) -> FunctionType | None:
    while isinstance(closure, partial):
        closure = closure.func
    function = inspect.unwrap(getattr(closure, "__func__", closure))
    return function if isinstance(function, FunctionType) else None


def _global_names(closure: Any) -> list[str]:
    """The globals that a closure reads. ``co_names`` does not distinguish them from attributes."""
    function = _function_of(closure)
    codes, names = [function.__code__] if function is not None else [], set()
    while codes:
        code = codes.pop()
        names |= {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return sorted(names)


def _variables(closure: Any, globals_read: list[str]) -> Iterator[tuple[str, Any]]:
    function = _function_of(closure)
    while isinstance(closure, partial):
        yield "args of the partial", closure.args
        yield "keywords of the partial", closure.keywords
        closure = closure.func
    if function is None:
        return
    yield from ((name, function.__globals__[name]) for name in globals_read if name in function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != _EMPTY:
            yield name, cell.cell_contents
    yield from ((f"default {i}", value) for i, value in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()


def _places(variables: Mapping[str, Any]) -> dict[str, Any]:
    places = {name: _place(value) for name, value in variables.items()}
    return {name: place for name, place in places.items() if place is not None}


def _place(value: object) -> Any:
    """The places (see ``place_of``) of the tensors in ``value``; None if there are none."""
    if isinstance(value, Tensor):
        return place_of(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple) and len(value) <= _LARGEST_BATCH:
        places = [_place(entry) for entry in value]
        return places if any(place is not None for place in places) else None
    return None
