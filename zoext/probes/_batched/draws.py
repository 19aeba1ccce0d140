"""Samples tokens with the random numbers that a single copy would have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SAMPLERS = (torch.multinomial, Tensor.multinomial)


class EqualDraws(TorchFunctionMode):
    """Has ``torch.multinomial`` draw for each copy from the same state of the generator.

    So that the losses of copies differ by their weights alone. The generator then moves as with one copy.

    Attributes:
        has_drawn: whether there was such a call.
    """

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.has_drawn = False
        self._copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SAMPLERS:
            return func(*args, **kwargs)
        probabilities, *others = args if args else (kwargs.pop("input"),)
        self.has_drawn = True
        if probabilities.dim() != 2 or len(probabilities) % self._copies:
            return func(probabilities, *others, **kwargs)
        generator = kwargs.get("generator") or _default_generator(probabilities.device)
        before = generator.get_state()
        found = []
        for part in probabilities.chunk(self._copies):
            generator.set_state(before)
            found.append(func(part, *others, **kwargs))
        return torch.cat(found)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = device.index if device.index is not None else torch.get_device_module(device).current_device()
    generator: torch.Generator = torch.get_device_module(device).default_generators[index]
    return generator
