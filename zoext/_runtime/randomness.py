"""The global random number generators that a closure may read."""

from __future__ import annotations

import operator
import random
import sys
import zlib
from typing import Any

import torch

from zoext._runtime.devices import get_rng_state, set_rng_state


class RandomState:
    """A snapshot of the generators of torch (the CPU's and those of ``devices``), Python and NumPy.

    The engine restores it before every probe of a step except the first, so that all probes use the same
    dropout masks. After the last probe the generators are in the state that a single closure call leaves.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._on_devices = {
            device: get_rng_state(device) for device in devices if device.type not in ("cpu", "meta")
        }
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy_random = numpy.random if numpy else None
        self._numpy = numpy.random.get_state() if numpy else None

    def read_since(self) -> list[str]:
        """The modules whose generators were used since the snapshot."""
        now = RandomState(*self._on_devices)
        moved = {"torch": not torch.equal(self._cpu, now._cpu), "random": self._python != now._python}
        for device, before in self._on_devices.items():
            after = now._on_devices[device]
            if before is not None and after is not None and not torch.equal(before, after):
                moved[f"torch.{device.type}"] = True
        if self._numpy is not None and now._numpy is not None:
            moved["numpy.random"] = any(map(operator.ne, self._numpy[2:], now._numpy[2:])) or bool(
                (self._numpy[1] != now._numpy[1]).any()
            )
        return [name for name, differs in moved.items() if differs]

    def digest(self) -> int:
        """A number for the state of all generators."""
        states = [self._cpu, *(state.cpu() for state in self._on_devices.values() if state is not None)]
        number = zlib.crc32(repr(self._python).encode())
        for state in states:
            number = zlib.crc32(state.numpy().tobytes(), number)
        if self._numpy is not None:
            number = zlib.crc32(repr(self._numpy[2:]).encode() + self._numpy[1].tobytes(), number)
        return number

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._on_devices.items():
            if state is not None:
                set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy_random is not None:
            self._numpy_random.set_state(self._numpy)
