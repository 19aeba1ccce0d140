"""What a closure does that a graph, which does not run its Python code again, would fix for ever."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from zoext._runtime.randomness import RandomState

#: Larger lists and dictionaries are data sets, not batches; nobody is to look through them at every step.
LARGEST_BATCH = 64

#: How far attributes are followed: ``self.options.scale``, and no further.
DEPTH = 2


def capturable(
    closure: Callable[[], Any], device: torch.device, watching: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], Tensor]:
    """The closure in ``watching()``, which raises if its value or its randomness could not be replayed."""

    def run() -> Tensor:
        before = RandomState(device)
        with watching():
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
    """What a closure's variables are bound to: places of tensors, plain numbers and strings, and modules.

    These are the globals that it names, the variables around it, its defaults, the arguments of a
    ``functools.partial``, and the object of a method or of a callable object. Of objects, the attributes
    are followed that its code names, or that of the object's own methods that it calls; of lists and
    dictionaries, all entries. Nothing is read that would run code, as properties.

    Raises:
        TypeError: for a closure without Python code, whose variables nobody can know.
    """

    def __init__(self, closure: Callable[[], Any]) -> None:
        self._given: dict[str, Any] = {}  # what is not a variable, by the name that errors give it
        self._function = self._unwrapped(closure)
        code = self._function.__code__
        self._globals = sorted(set(_names(code, "LOAD_GLOBAL")))
        self._attributes = _attributes(code, [type(value) for value in self._variables().values()])
        self.modules: list[nn.Module] = []
        self.look()

    def look(self) -> None:
        """Takes what everything is bound to now as known, and notes the ``modules`` among it."""
        self.modules = []
        self._known = {name: self._fixed(value) for name, value in self._variables().items()}

    def rebound(self) -> list[str]:
        """The names of variables that are bound to something else, or hold it, since ``look``."""
        now = {name: self._fixed(value) for name, value in self._variables().items()}
        return [name for name in self._known.keys() | now.keys() if self._known.get(name) != now.get(name)]

    def _unwrapped(self, closure: Any) -> FunctionType:
        while not isinstance(closure, FunctionType):
            if isinstance(closure, partial):
                self._given |= {
                    "args of the partial": closure.args,
                    "keywords of the partial": closure.keywords,
                }
                closure = closure.func
            elif isinstance(closure, MethodType):
                self._given["self"] = closure.__self__
                closure = closure.__func__
            elif isinstance(call := inspect.getattr_static(type(closure), "__call__", None), FunctionType):
                self._given["self"] = closure
                closure = closure.forward if isinstance(closure, nn.Module) else call
            else:
                raise TypeError(
                    f"closure must have Python code, so that its variables can be watched, not {closure!r}; "
                    "wrap it in a lambda"
                )
        unwrapped = inspect.unwrap(closure)  # decorators such as torch.autocast
        return unwrapped if isinstance(unwrapped, FunctionType) else self._unwrapped(unwrapped)

    def _variables(self) -> dict[str, Any]:
        function = self._function
        bound = {name: function.__globals__.get(name) for name in self._globals}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                bound[name] = cell.cell_contents
            except ValueError:  # not bound yet
                bound[name] = None
        bound |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
        bound |= function.__kwdefaults__ or {}
        return bound | self._given

    def _fixed(self, value: object, depth: int = DEPTH) -> Any:
        if isinstance(value, Tensor):
            return place(value)
        if isinstance(value, bool | int | float | str):
            return type(value), value
        if isinstance(value, nn.Module):  # of which more is known: see zoext/graphs/_modules.py
            self.modules.append(value)
            return id(value)
        if isinstance(value, Mapping) and len(value) <= LARGEST_BATCH:
            return {str(key): self._fixed(entry, depth) for key, entry in value.items()}
        if isinstance(value, list | tuple) and len(value) <= LARGEST_BATCH:
            return [self._fixed(entry, depth) for entry in value]
        if depth and (held := getattr(value, "__dict__", None)):
            return {
                name: self._fixed(held[name], depth - 1) for name in self._attributes if name in held
            } or None
        return None


def place(tensor: Tensor) -> tuple[Any, ...]:
    """What a kernel that was launched with ``tensor`` goes on reading."""
    if tensor.layout != torch.strided:
        return id(tensor), tensor.shape, tensor.dtype
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _names(code: CodeType, *operations: str) -> Iterator[str]:
    # Not co_names, which does not tell globals from attributes.
    for instruction in dis.get_instructions(code):
        if instruction.opname in operations:
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant, *operations)


def _attributes(code: CodeType, kinds: list[type]) -> list[str]:
    """The attributes that ``code`` names, and those that methods of ``kinds`` name which it calls."""
    found: set[str] = set()
    codes = [code]
    while codes:
        new = set(_names(codes.pop(), "LOAD_ATTR", "LOAD_METHOD")) - found
        found |= new
        methods = (inspect.getattr_static(kind, name, None) for kind in kinds for name in new)
        functions = (method.fget if isinstance(method, property) else method for method in methods)
        codes += [function.__code__ for function in functions if isinstance(function, FunctionType)]
    return sorted(found)
