"""Handles losses that are not finite without synchronizing host and device in a step."""

from __future__ import annotations

import torch
from torch import Tensor


class NonfiniteWatch:
    """Counts estimates that were not finite, and raises if the policy is "raise".

    On the CPU the flag of an estimate is checked immediately. On CUDA the flag is copied to pinned memory
    after the forwards and checked when the next estimate begins, so no step waits for its own flag, and at
    most one step is in flight. On other devices the next estimate reads the flag from the device.
    """

    def __init__(self, policy: str) -> None:
        if policy not in {"raise", "skip"}:
            raise ValueError(f"nonfinite must be 'raise' or 'skip', not {policy!r}")
        self._raises = policy == "raise"
        self._counter: Tensor | None = None
        self._travelling: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def note(self, finite: Tensor) -> None:
        """Registers the flag (bool []) of an estimate."""
        if self._counter is None:
            self._counter = torch.zeros((), dtype=torch.int64, device=finite.device)
        self._counter += ~finite
        if not self._raises:
            return
        if finite.device.type == "cpu":
            if not finite:
                self._raise("this")
        elif finite.is_cuda:
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(finite.device))
            self._travelling.append((flag, event))
        else:
            self._travelling.append((finite, None))

    def check(self) -> None:
        """Raises if an earlier estimate was not finite."""
        travelling, self._travelling = self._travelling, []
        for flag, event in travelling:
            if event is not None:
                event.synchronize()
            if not flag:
                self._raise("the previous")

    @property
    def count(self) -> int:
        return 0 if self._counter is None else int(self._counter)

    @staticmethod
    def _raise(which: str) -> None:
        raise FloatingPointError(
            f"a loss of {which} step, or what a layer was fed, was not finite; theta was not moved by it. "
            "Lower lr or mu, check the batch, or pass nonfinite='skip' to leave such steps out"
        )
