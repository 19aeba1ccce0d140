"""Times work on a GPU by the GPU's own events."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from zoext.benchmarking.timing import Spread

Cases = Mapping[str, Callable[[], object]]

#: A sample is as many runs, one behind the other, as take this long: far above the grain of events.
SAMPLE_SECONDS = 0.05
MOST_RUNS = 1000


def timed(cases: Cases, *, repeats: int, device: torch.device) -> tuple[dict[str, Spread], list[str]]:
    """The seconds of one run of each case, and the names of the cases that the memory is too small for.

    Two runs of each case warm up: code is loaded and memory taken from the device in the first. All cases
    run in every round, so that a change of the clocks meets all of them. Torch's generators are put back.

    Raises:
        RuntimeError: if the events show no time for a thousand runs of a case.
    """
    with torch.cuda.device(device), torch.random.fork_rng(devices=[device]):
        fitting = {name: case for name, case in cases.items() if _fits(case)}
        runs = {name: _runs(case) for name, case in fitting.items()}
        rounds: dict[str, list[float]] = {name: [] for name in fitting}
        for _ in range(repeats):
            for name, case in fitting.items():
                seconds = _seconds(case, runs[name])
                if seconds <= 0:
                    raise RuntimeError(f"the device's events show no time for {runs[name]} runs of {name}")
                rounds[name].append(seconds / runs[name])
    times = {name: Spread(tuple(seconds)) for name, seconds in rounds.items()}
    return times, [name for name in cases if name not in fitting]


def _fits(case: Callable[[], object]) -> bool:
    try:
        case()
    except torch.OutOfMemoryError:
        return False
    return True


def _runs(case: Callable[[], object]) -> int:
    once = _seconds(case, 1)
    return MOST_RUNS if once <= 0 else max(1, min(MOST_RUNS, math.ceil(SAMPLE_SECONDS / once)))


def _seconds(case: Callable[[], object], runs: int) -> float:
    """Of ``runs`` runs in a row. One before them keeps the device busy until the host is ahead of it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    case()
    begin.record()
    for _ in range(runs):
        case()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
