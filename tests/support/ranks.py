"""Runs a function in several processes, the ranks of a process group."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch import distributed


def fork(count: int, act: Callable[[int], None]) -> int:
    """Calls ``act(rank)`` in ``count`` forks of this process; returns the largest exit status."""
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            try:
                act(number)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def join(number: int, count: int, folder: Path) -> None:
    """Makes this process a rank of the default process group; all of them meet in ``folder``."""
    store = distributed.FileStore(str(folder / "store"), count)
    distributed.init_process_group(
        "gloo", store=store, rank=number, world_size=count, timeout=timedelta(seconds=120)
    )
