"""Runs a function in several processes, the ranks of a process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from torch import distributed

from support import environment


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


@cache  # groups take long to make
def first(count: int) -> Any:
    """The group of the first ``count`` ranks; all ranks must call this in the same order."""
    return distributed.new_group(list(range(count)))


Case = Callable[[int], None]


def run_cases(
    cases: Mapping[str, Case],
    count: int,
    folder: Path | None = None,
    prepare: Callable[[], object] | None = None,
) -> int:
    """Runs all cases on each of ``count`` ranks, and writes what went wrong for ``errors_in``.

    ``prepare`` is called once, before there are ranks: all of them have what it computes.

    Returns:
        The largest exit status.
    """
    folder = folder or Path(sys.argv[1])
    if prepare is not None:
        prepare()

    def run(number: int) -> None:
        join(number, count, folder)
        with (folder / f"{number}.jsonl").open("w", buffering=1) as results:
            for name, act in cases.items():
                error = None
                try:
                    act(number)
                except Exception:
                    error = traceback.format_exc()
                results.write(json.dumps([name, error]) + "\n")

    return fork(count, run)


def errors_of(program: str, folder: Path, count: int) -> dict[str, list[str | None]]:
    """Runs a module that calls ``run_cases``.

    Returns what went wrong in each case, for each rank that took part.
    """
    ended = subprocess.run(
        [sys.executable, "-m", program, str(folder)],
        env=environment(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TORCH_CPP_LOG_LEVEL="ERROR"),
        timeout=600,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return errors_in(folder, count)


def errors_in(folder: Path, count: int) -> dict[str, list[str | None]]:
    """What ``run_cases`` wrote to ``folder``."""
    found: dict[str, list[str | None]] = {}
    for rank in range(count):
        lines = folder / f"{rank}.jsonl"
        for line in lines.read_text().splitlines() if lines.exists() else ():
            name, error = json.loads(line)
            found.setdefault(name, []).append(error)
    return found
