"""The folder of a command, into which no other process writes until the command has ended."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from zoext._runtime import atomic
from zoext.cli.errors import UserError, writing
from zoext.trajectory import OwnedFile

RUNS = Path("runs")
LOCK = "run.lock"


@contextmanager
def claimed(out: Path | None, name: str) -> Iterator[Path]:
    """The folder ``out``, made if it is missing, or a new one of that ``name`` below ``runs``.

    It is locked until the end of the block: what a command finds there holds until then. Folders that were
    made for it and are still empty are removed.

    Raises:
        UserError: if another process is writing there, or there can be no such folder.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    place = out or RUNS / name
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    with writing(place):
        if out is None:
            place = make_unused(RUNS, name)
            made.insert(0, place)
        else:
            atomic.make_folder(place)
    try:
        with _locked(place):
            yield place
    finally:
        for folder in made:
            with suppress(OSError):  # what was written into stays
                folder.rmdir()


def make_unused(parent: Path, name: str) -> Path:
    """Makes the first of ``name-1``, ``name-2``, ... that is not there yet, also if others do so now."""
    atomic.make_folder(parent)
    for number in count(1):
        path = parent / f"{name}-{number}"
        with suppress(FileExistsError):
            path.mkdir()
            break
    atomic.sync(parent)
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        try:
            lock = OwnedFile(folder / LOCK, make=True)
        except FileNotFoundError:  # another command has just now removed the folder that it had made
            atomic.make_folder(folder)
            lock = OwnedFile(folder / LOCK, make=True)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ESTALE):  # the latter: it has ended just now
            raise UserError(
                f"{folder / LOCK}: {error.strerror}; put that right or give another --out"
            ) from None
        raise UserError(
            f"--out {folder}: another process is writing this run; wait for its end, stop it, or give "
            "another --out"
        ) from None
    with lock:
        if os.fstat(lock.descriptor).st_size:
            raise UserError(
                f"{lock.path}: is not zoext's, whose lock is empty; move it away or give another --out"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                lock.path.unlink()  # before it is let go: the next one makes another
