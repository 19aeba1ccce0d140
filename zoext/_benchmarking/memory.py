"""Peak memory of a piece of work."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

MIB = 2**20


def peak(work: Callable[[], object], device: torch.device) -> int:
    """The peak number of bytes in use during ``work``, minus those in use before it.

    Counts the memory that torch's allocator hands out, as seen by the profiler on a CPU and by the caching
    allocator on a GPU. ``work`` runs twice and the second run counts: memory that it keeps between runs then
    exists before, and the profiler has seen the allocation of everything that it sees freed.
    """
    return cuda_peaks(work, device).allocated if device.type == "cuda" else _peak_on_cpu(work)


class CudaPeaks(NamedTuple):
    """Peak bytes that torch's allocator hands out, and that it reserves on the device.

    The private pool of a CUDA graph counts as reserved even while nothing in it is handed out.
    """

    allocated: int
    reserved: int


def cuda_peaks(work: Callable[[], object], device: torch.device) -> CudaPeaks:
    """Like ``peak``, on a GPU."""
    work()
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = CudaPeaks(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))
    work()
    torch.cuda.synchronize(device)
    return CudaPeaks(
        torch.cuda.max_memory_allocated(device) - before.allocated,
        torch.cuda.max_memory_reserved(device) - before.reserved,
    )


def _peak_on_cpu(work: Callable[[], object]) -> int:
    # Kineto reads this at its first use; without it, it logs its start and end to stderr.
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
