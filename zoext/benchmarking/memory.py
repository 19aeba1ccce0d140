"""The peak of memory during some work."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20


def peak(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes in use during ``work`` beyond those in use before it.

    Counts what torch's allocator hands out: the profiler writes it down on a CPU, the caching allocator
    on a GPU. It runs twice and the second run counts, so that what it keeps between runs is there
    before, and so that the profiler has seen the making of all that it then sees freed.
    """
    return _peak_on_cuda(work, device) if device.type == "cuda" else _peak_on_cpu(work)


def _peak_on_cuda(work: Callable[[], object], device: torch.device) -> int:
    work()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(work: Callable[[], object]) -> int:
    # Kineto, below the profiler, reads this at its first use; else it says on stderr that it began and ended.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
        with torch.profiler.record_function("second run"):
            work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    began = next(event["ts"] for event in events if event["name"] == "second run")
    in_use = before = highest = 0
    for change in sorted((e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"]):
        in_use += change["args"]["Bytes"]
        if change["ts"] < began:
            before = highest = in_use
        highest = max(highest, in_use)
    return int(highest - before)
