"""The global random number generators that a closure may read."""

from __future__ import annotations

import operator
import random
import sys
from typing import Any

import torch

from zoext._runtime import devices


class RandomState:
    """A snapshot of the generators of torch (the CPU's and that of ``device``), Python and NumPy.

    The engine restores it before every probe of a step except the first, so that all probes use the same
    dropout masks. After the last probe the generators are in the state that a single closure call leaves.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type != "cpu" else None
        self._on_device = devices.get_rng_state(device) if self._device else None
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy_random = numpy.random if numpy else None
        self._numpy = numpy.random.get_state() if numpy else None

    def read_since(self) -> list[str]:
        """The modules whose generators were used since the snapshot."""
        now = RandomState(self._device or torch.device("cpu"))
        moved = {"torch": not torch.equal(self._cpu, now._cpu), "random": self._python != now._python}
        if self._device and self._on_device is not None and now._on_device is not None:
            moved[f"torch.{self._device.type}"] = not torch.equal(self._on_device, now._on_device)
        if self._numpy is not None and now._numpy is not None:
            moved["numpy.random"] = any(map(operator.ne, self._numpy[2:], now._numpy[2:])) or bool(
                (self._numpy[1] != now._numpy[1]).any()
            )
        return [name for name, differs in moved.items() if differs]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._device and self._on_device is not None:
            devices.set_rng_state(self._on_device, self._device)
        random.setstate(self._python)
        if self._numpy_random is not None:
            self._numpy_random.set_state(self._numpy)
