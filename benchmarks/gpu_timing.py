"""Times work on a GPU by the GPU's own events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from zoext._benchmarking.timing import Measurement

Cases = Mapping[str, Callable[[], object]]

#: A sample is as many runs, one behind the other, as take this long: far above the grain of events.
SAMPLE_SECONDS = 0.05
MOST_RUNS = 1000

#: Where the host needs this part of a run's time to launch it, the device waits for the host.
BOUND_BY_LAUNCHES = 0.9


@dataclass(frozen=True)
class Timings:
    """What the cases took, by name.

    Attributes:
        seconds: of one run, by the device's events.
        launching: the part of them that the host needs to launch the run.
        left_out: the cases that the memory is too small for.
    """

    seconds: dict[str, Measurement]
    launching: dict[str, Measurement]
    left_out: list[str]

    def bound_by_launches(self) -> dict[str, float]:
        """The cases whose time says what the host can launch, not what the device can do, and the part."""
        parts = {name: part.median for name, part in self.launching.items()}
        return {name: part for name, part in parts.items() if part >= BOUND_BY_LAUNCHES}


@dataclass(frozen=True)
class Sample:
    """Seconds of one run: of the device, and of the host that launches it."""

    device: float
    host: float


def timed(cases: Cases, *, repeats: int, device: torch.device) -> Timings:
    """One run of each case.

    Two runs of each case warm up: code is loaded and memory taken from the device in the first. All cases
    run in every round, so that a change of the clocks meets all of them. Torch's generators are put back.

    Raises:
        RuntimeError: if the events show no time for a thousand runs of a case.
    """
    with torch.cuda.device(device), torch.random.fork_rng(devices=[device]):
        fitting = {name: case for name, case in cases.items() if _fits(case)}
        runs = {name: _runs(case) for name, case in fitting.items()}
        rounds: dict[str, list[Sample]] = {name: [] for name in fitting}
        for _ in range(repeats):
            for name, case in fitting.items():
                sample = _sample(case, runs[name])
                if sample.device <= 0:
                    raise RuntimeError(f"the device's events show no time for {runs[name]} runs of {name}")
                rounds[name].append(sample)
    seconds, host = (
        {
            name: Measurement(tuple(getattr(sample, clock) for sample in samples))
            for name, samples in rounds.items()
        }
        for clock in ("device", "host")
    )
    launching = {name: host[name] / seconds[name] for name in fitting}
    return Timings(seconds, launching, [name for name in cases if name not in fitting])


def _fits(case: Callable[[], object]) -> bool:
    try:
        case()
    except torch.OutOfMemoryError:
        return False
    return True


def _runs(case: Callable[[], object]) -> int:
    once = _sample(case, 1).device
    return MOST_RUNS if once <= 0 else max(1, min(MOST_RUNS, math.ceil(SAMPLE_SECONDS / once)))


def _sample(case: Callable[[], object], runs: int) -> Sample:
    """Of ``runs`` runs in a row. One before them keeps the device busy while the host gets ahead of it.

    The launches of that one find an empty queue. Those of the others can meet a full one, where the host
    waits for the device: the smaller of the two times is what the host itself needs.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.perf_counter()
    case()
    first = time.perf_counter() - began
    begin.record()
    began = time.perf_counter()
    for _ in range(runs):
        case()
    others = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize()
    return Sample(begin.elapsed_time(end) / 1e3 / runs, min(first, others / runs))
