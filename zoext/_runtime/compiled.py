"""Code compiled by torch.compile: whether it is being called, and how to run it as it is written.

Dynamo is imported by then: building a ``torch.optim.Optimizer`` imports it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_LOCK = threading.Lock()
_STANCE = ExitStack()  # how the last block is left
_blocks = 0  # that are open, in all threads


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs compiled code as it is written within the block.

    The stance of torch.compile belongs to the process. Blocks of several threads, such as those of members of
    a group, end in any order, so the first one sets it and the last one puts back what was there.
    """
    global _blocks
    with _LOCK:
        if not _blocks:
            _STANCE.enter_context(torch.compiler.set_stance("force_eager"))
        _blocks += 1
    try:
        yield
    finally:
        with _LOCK:
            _blocks -= 1
            if not _blocks:
                _STANCE.close()


def runs_compiled() -> bool:
    """Whether the caller was called by code that ``uncompiled`` keeps from running compiled."""
    names = sys.modules["torch._dynamo.eval_frame"].__dict__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is names and frame.f_code.co_name == "compile_wrapper":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
