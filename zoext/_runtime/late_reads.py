"""Reads values of the device on the host, one step after they were computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateReads:
    """Small tensors on their way to the host.

    On CUDA they are copied to pinned memory without waiting; by the time of the next step they have arrived,
    so that at most one step is in flight and none waits for its own values.
    """

    def __init__(self) -> None:
        self._travelling: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def send(self, values: Tensor) -> None:
        """Begins to copy ``values``, which must not change until they are taken."""
        if not values.is_cuda:
            self._travelling.append((values, None))
            return
        copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copied.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        self._travelling.append((copied, event))

    def take(self, *, wait: bool = True) -> list[Any]:
        """The values that were sent and not yet taken, as nested lists; without ``wait``, those here."""
        arrived = []
        while self._travelling:
            values, event = self._travelling[0]
            if event is not None:
                if not wait and not event.query():
                    break
                event.synchronize()
            arrived.append(values.tolist())
            del self._travelling[0]
        return arrived
