"""The phases of a step as events that profilers see (docs/profiling.md)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import profiler


class Phase(StrEnum):
    """What an optimizer is doing; the value is the name of the event."""

    ESTIMATE = "zoext.estimate"  # all the probes of an estimate, and the loss's way to coefficients
    PERTURB = "zoext.perturb"
    FORWARD = "zoext.forward"  # the closure; streamed probes perturb and restore within it
    RESTORE = "zoext.restore"
    UPDATE = "zoext.update"


_UNSEEN = nullcontext()
_AS_USER_SCOPE = {"scope": "user_scope"}  # heeded by profilers that record shapes


def record(phase: Phase) -> AbstractContextManager[None]:
    """The block is an event of ``torch.profiler``, and a range of NVTX under ``emit_nvtx``.

    A profiler that starts within the block does not see it, nor is it seen in code that torch.compile
    makes of a hook. While no profiler looks, nothing is made.
    """
    # Not torch.profiler.record_function: it takes microseconds, also while nobody looks, and goes through
    # the dispatcher, where a mode that watches operators makes a range of NVTX that would overlap this one.
    # The flag comes first since _RecordFunctionFast fails at the end of a block in which a profiler started.
    if not profiler._is_profiler_enabled or torch.compiler.is_compiling():
        return _UNSEEN
    return _RecordFunctionFast(phase, keyword_values=_AS_USER_SCOPE)
