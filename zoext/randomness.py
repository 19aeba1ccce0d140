"""The global random number generators that a closure may read."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class RandomState:
    """A snapshot of the generators of torch (CPU, and ``device`` if it is CUDA), Python and NumPy.

    Restored before every probe of a step but the first, it shows all of them the same dropout; and
    after the last one the generators stand where the closure alone would have left them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type == "cuda" else None
        self._cuda = torch.cuda.get_rng_state(device) if self._device else None
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy_random = numpy.random if numpy else None
        self._numpy = numpy.random.get_state() if numpy else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._device and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        random.setstate(self._python)
        if self._numpy_random is not None:
            self._numpy_random.set_state(self._numpy)
