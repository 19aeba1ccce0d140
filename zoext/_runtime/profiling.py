"""Marks the phases of a step as profiler events (docs/profiling.md)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import profiler


class Phase(StrEnum):
    """A phase of a step; the value is the name of the event."""

    ESTIMATE = "zoext.estimate"  # all probes of an estimate, and the computation of its coefficients
    PERTURB = "zoext.perturb"
    FORWARD = "zoext.forward"  # the closure; streamed probes perturb and restore within it
    RESTORE = "zoext.restore"
    UPDATE = "zoext.update"


_UNSEEN = nullcontext()
_AS_USER_SCOPE = {"scope": "user_scope"}  # used by profilers that record shapes


def record(phase: Phase) -> AbstractContextManager[None]:
    """Makes the block an event of ``torch.profiler``, and an NVTX range under ``emit_nvtx``.

    The event is missing from a profiler that starts within the block, and from code that torch.compile
    generates for a hook. Without an active profiler, no event is created.
    """
    # Not torch.profiler.record_function: it takes microseconds even without a profiler, and it goes through
    # the dispatcher, where a mode that watches operators creates an NVTX range that would overlap this one.
    # The flag is checked first because _RecordFunctionFast fails on exit if a profiler started in the block.
    if not profiler._is_profiler_enabled or torch.compiler.is_compiling():
        return _UNSEEN
    return _RecordFunctionFast(phase, keyword_values=_AS_USER_SCOPE)
