"""Times several cases in interleaved rounds and compares them round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Measurement:
    """A figure per round, such as seconds or a ratio."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def __truediv__(self, other: Measurement) -> Measurement:
        """Divides round by round, so that disturbances of a whole round cancel."""
        return Measurement(tuple(a / b for a, b in zip(self.rounds, other.rounds, strict=True)))

    def larger_of(self, other: Measurement) -> Measurement:
        """The maximum round by round."""
        return Measurement(tuple(max(pair) for pair in zip(self.rounds, other.rounds, strict=True)))


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    seconds: float = float("inf"),
) -> dict[str, Measurement]:
    """The seconds of each case, measured once per round in ``repeats`` rounds, after a warm-up round.

    All cases run in every round, so that changes of the machine's speed affect all of them. No round starts
    after ``seconds``, except the first. The state of torch's generators is restored.

    Raises:
        ValueError: unless ``repeats`` is positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    rounds: dict[str, list[float]] = {name: [] for name in cases}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        began = time.perf_counter()
        for case in cases.values():
            case()
        for _ in range(repeats):
            for name, case in cases.items():
                rounds[name].append(_seconds(case, device))
            if time.perf_counter() - began > seconds:
                break
    return {name: Measurement(tuple(times)) for name, times in rounds.items()}


def _seconds(case: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    case()
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Makes the operators of torch and zoext use ``count`` threads within the block, or as many as now."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
