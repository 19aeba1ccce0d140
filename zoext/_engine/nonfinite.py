"""What happens about losses that are not finite, without making a step wait for the host."""

from __future__ import annotations

import torch
from torch import Tensor


class NonfiniteWatch:
    """Notes whether estimates were finite, and raises if asked to.

    On the CPU an estimate is judged at once. On CUDA its flag travels to pinned memory behind the
    forwards and is looked at when the next estimate begins: by then the host has waited for nothing
    that the device had not finished anyway, but at most one step is in flight. On other devices the flag
    is read there and then.
    """

    def __init__(self, policy: str) -> None:
        if policy not in {"raise", "skip"}:
            raise ValueError(f"nonfinite must be 'raise' or 'skip', not {policy!r}")
        self._raises = policy == "raise"
        self._counter: Tensor | None = None
        self._travelling: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def note(self, finite: Tensor) -> None:
        """Takes the flag (bool []) of an estimate."""
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
