"""Handles losses that say nothing, without synchronizing host and device in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from zoext._runtime.late_reads import LateReads
from zoext._runtime.notices import warn
from zoext.estimators import Estimate

#: Consecutive estimates whose losses are all equal, before they are told.
FLAT = 4


class LossWatch:
    """Looks at the losses of every estimate: at those that are not finite, and those that are all equal.

    Counts estimates that were not finite, and raises if the policy is "raise". Warns after ``FLAT``
    consecutive estimates whose losses were bit-identical, which usually means that the closure does not
    run what the optimizer moves.

    On the CPU a loss that is not finite is reported immediately, on other devices when the next estimate
    begins: no step waits for its own flags. On devices other than CPU and CUDA, the policy "skip" waits for
    nothing and does not notice equal losses.
    """

    def __init__(self, policy: str) -> None:
        if policy not in {"raise", "skip"}:
            raise ValueError(f"nonfinite must be 'raise' or 'skip', not {policy!r}")
        self._raises = policy == "raise"
        self._counts: Tensor | None = None  # estimates that were not finite; consecutive flat ones
        self._reads = LateReads()

    def note(self, estimate: Estimate) -> None:
        """Registers an estimate."""
        finite, flat = estimate.finite, estimate.loss_std == 0
        if self._counts is None:
            self._counts = torch.zeros(2, dtype=torch.int64, device=finite.device)
        nonfinite, streak = self._counts.unbind()
        nonfinite += ~finite
        streak += 1
        streak *= flat
        if finite.device.type == "cpu" and self._raises and not finite:
            self._raise("this")
        if self._raises or finite.device.type in ("cpu", "cuda"):  # elsewhere reading makes the host wait
            self._reads.send(torch.stack((~finite, streak)))

    def check(self) -> None:
        """Raises if an earlier estimate was not finite, and warns of the ``FLAT``-th with equal losses."""
        for is_nonfinite, streak in self._reads.take(wait=self._raises):
            if is_nonfinite and self._raises:
                self._raise("the previous")
            if streak == FLAT:
                self._warn()

    @property
    def count(self) -> int:
        """The number of estimates that were not finite."""
        return 0 if self._counts is None else int(self._counts[0])

    @staticmethod
    def _raise(which: str) -> None:
        raise FloatingPointError(
            f"a loss of {which} step, or a layer's input, was not finite; theta was not moved by it. "
            "Lower lr or mu, check the batch, or pass nonfinite='skip' to leave such steps out"
        )

    @staticmethod
    def _warn() -> None:
        warn(
            f"the losses of each of the last {FLAT} estimates were bit-identical, so there is no slope to "
            "follow. Either the closure does not run what the optimizer moves (but another model, a copy, or "
            "an adapter that is merged or disabled), or its value does not change at this scale: it is "
            "constant, counts (as an accuracy does), is a reward that all candidates get or all miss (take "
            "more examples, or grade them finer), or mu is too small"
        )
