"""Ctrl-C at a chosen line of the product's code."""

from __future__ import annotations

import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Collection
from types import FrameType


def moments(work: Callable[[], object], files: Collection[str], most: int = 3) -> list[int]:
    """Where to stop ``work``: numbers of lines of ``files`` in the order in which it runs them, from 1.

    Of a line that runs often, the first, the last and others between, ``most`` in all.
    """
    runs: dict[tuple[str, int], list[int]] = defaultdict(list)
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines += 1
            runs[frame.f_code.co_filename, frame.f_lineno].append(lines)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    chosen = (
        numbers[round(step * (len(numbers) - 1) / (most - 1))]
        for numbers in runs.values()
        for step in range(most)
    )
    return sorted(set(chosen))


def is_interrupted(work: Callable[[], object], stop_at: int, files: Collection[str]) -> bool:
    """Runs ``work`` with a SIGINT before line number ``stop_at`` of those of ``files`` that it runs, from 1.

    Whether there was such a line, and KeyboardInterrupt came out of it.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines += 1
            if lines == stop_at:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False
