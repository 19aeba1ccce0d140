"""Code compiled by torch.compile: whether it is being called, and how to run it as it is written.

Dynamo is imported by then: building a ``torch.optim.Optimizer`` imports it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

import torch


def uncompiled() -> AbstractContextManager[None]:
    """Runs compiled code as it is written within the block."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def runs_compiled() -> bool:
    """Whether the caller was called by code that ``uncompiled`` keeps from running compiled."""
    names = sys.modules["torch._dynamo.eval_frame"].__dict__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is names and frame.f_code.co_name == "compile_wrapper":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
