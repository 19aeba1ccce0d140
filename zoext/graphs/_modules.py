"""What a graph holds of modules as it was at the capture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zoext.graphs._closures import place

_PLAIN = (bool, int, float, str)


class ModuleState:
    """The parts of modules, their modes, and where their weights, buffers and plain attributes are.

    Compared at every step, so it holds lists that are made again and compared without Python code of
    their own, and walks the modules only once.

    Args:
        roots: with all modules below them.
        others: more tensors that are to stay where they are.
    """

    def __init__(self, roots: Iterable[nn.Module], others: Iterable[Tensor]) -> None:
        parts = {id(part): (name, part) for root in roots for name, part in root.named_modules()}
        tensors = list(others)
        self._scripted: list[nn.Module] = []
        self._dicts: list[dict[str, Any]] = []
        self._plain: list[tuple[dict[str, Any], str, str]] = []
        self._held: list[tuple[dict[str, Any], str, str]] = []
        for path, part in parts.values():
            if isinstance(part, torch.jit.ScriptModule):  # whose attributes are not Python's
                self._scripted.append(part)
                tensors += [*part.parameters(recurse=False), *part.buffers(recurse=False)]
                continue
            for held in (part._modules, part._parameters, part._buffers, vars(part)):
                self._dicts.append(held)
                for name, value in held.items():
                    entry = (held, name, f"{path}.{name}".lstrip("."))
                    if isinstance(value, _PLAIN):
                        self._plain.append(entry)
                    elif value is None or isinstance(value, nn.Module | Tensor):
                        self._held.append(entry)
        self._sizes = list(map(len, self._dicts))
        self._numbers = self._look(self._plain)
        self._kinds = list(map(type, self._numbers))
        self._values = self._look(self._held)
        tensors += [value for value in self._values if isinstance(value, Tensor)]
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._places = list(map(place, self._tensors))
        self._modes = [part.training for part in self._scripted]

    @staticmethod
    def _look(entries: list[tuple[dict[str, Any], str, str]]) -> list[Any]:
        return [held.get(name) for held, name, _ in entries]

    def is_current(self) -> bool:
        """Whether all is as it was when this was made."""
        numbers = self._look(self._plain)
        return (
            [part.training for part in self._scripted] == self._modes
            and list(map(len, self._dicts)) == self._sizes
            and list(map(type, numbers)) == self._kinds  # before ==, which means another thing for tensors
            and numbers == self._numbers
            and list(map(id, self._look(self._held))) == list(map(id, self._values))
            and list(map(place, self._tensors)) == self._places
        )

    def changed(self) -> list[str]:
        """The names of attributes, weights and buffers that are other ones than when this was made."""
        names = [
            label
            for (held, name, label), known in zip(self._plain, self._numbers, strict=True)
            if held.get(name) is not known
            and (type(held.get(name)) is not type(known) or held[name] != known)
        ]
        names += [
            label
            for (held, name, label), known in zip(self._held, self._values, strict=True)
            if held.get(name) is not known
        ]
        return names
