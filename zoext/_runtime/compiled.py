"""Code compiled by torch.compile: whether it is being called, and how to run it as it is written."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def uncompiled() -> AbstractContextManager[None]:
    """Runs compiled code as it is written within the block."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def runs_compiled() -> bool:
    """Whether the caller was called by code that ``uncompiled`` keeps from running compiled."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    frame = sys._getframe(1) if dynamo is not None else None
    while frame is not None:
        if frame.f_globals is dynamo.__dict__ and frame.f_code.co_name == "compile_wrapper":
            return True
        frame = frame.f_back
    return False
