"""Schedules of lr and mu: factors that are pure functions of how much of a run is done.

They have no state, so a resumed run continues with the same bits. A replay needs none of them, because a
trajectory records lr and mu of every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from zoext.cli._errors import UserError
from zoext.cli._settings import CommonSettings

CONSTANT = "constant"
SHAPES = (CONSTANT, "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A factor over a run of ``total`` steps, or other units of work.

    It rises linearly to 1 during ``warmup`` and then falls to ``end``, which the step after the last one
    would have: with ``end`` 0, no step of the run has a factor of 0.
    """

    shape: str
    total: int
    warmup: int = 0
    end: float = 0.0

    def factor(self, done: int, size: int = 1) -> float:
        """The factor of a step of ``size`` units, when ``done`` of them are done."""
        if done < self.warmup:
            return min(1.0, (done + size) / self.warmup)
        if self.shape == CONSTANT:
            return 1.0
        share = min(1.0, (done - self.warmup) / (self.total - self.warmup))
        left = 1 - share if self.shape == "linear" else (1 + math.cos(math.pi * share)) / 2
        return self.end + (1 - self.end) * left


@dataclass(frozen=True)
class Schedules:
    """lr and mu of each step of a run."""

    lr: float
    mu: float
    of_lr: Schedule
    of_mu: Schedule

    @classmethod
    def of(cls, settings: CommonSettings, shape: str, total: int) -> Schedules:
        """Those of a run of ``total`` steps or forward passes, with lr in the given ``shape``."""
        return cls(
            settings.lr,
            settings.mu,
            Schedule(shape, total, settings.warmup, settings.lr_end),
            Schedule(settings.mu_schedule, total, end=settings.mu_end),
        )

    def set(self, groups: Iterable[dict[str, Any]], done: int, size: int = 1) -> None:
        """Sets lr and mu of the next step, of ``size`` units, in all parameter groups."""
        lr, mu = self.lr * self.of_lr.factor(done, size), self.mu * self.of_mu.factor(done, size)
        for group in groups:
            group["lr"], group["mu"] = lr, mu


def check_warmup(warmup: int, option: str, total: int) -> None:
    """Raises a UserError for a warm-up that is as long as the run, whose length ``option`` gives."""
    if warmup >= total:
        raise UserError(f"--warmup {warmup}: must be less than {option}, which is {total}")
