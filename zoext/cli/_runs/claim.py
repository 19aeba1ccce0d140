"""Locks the output folder of a command against other processes until the command ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from zoext._runtime import atomic
from zoext.cli._errors import UserError, writing
from zoext.cli._ranks import ALONE, Ranks
from zoext.trajectory import OwnedFile

LOCK = "run.lock"

_RUNS = Path("runs")
_OUT = "out"


@contextmanager
def claimed(out: Path | None, name: str, ranks: Ranks = ALONE) -> Iterator[Path]:
    """Locks the folder ``out``, created if missing, or a new ``runs/NAME-N``, until the end of the block.

    Nothing that the command finds in the folder changes in the meantime. Folders that were created for it and
    are still empty at the end are removed. Of several ranks, the first one locks the folder for all of them;
    if torchrun has restarted them, a ``runs/NAME-N`` is that of the attempt before.

    Raises:
        UserError: if another process is writing there, or the folder cannot be created.
    """
    if not ranks.is_first:
        yield Path(ranks.shared(_OUT, str))
        return
    if out is None and (kept := ranks.kept(_OUT)) is not None:
        out = Path(kept)
    with _claimed(out, name) as place:
        ranks.keep(_OUT, str(place))
        ranks.shared(_OUT, lambda: str(place))
        yield place


@contextmanager
def _claimed(out: Path | None, name: str) -> Iterator[Path]:
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    place = out or _RUNS / name
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    with writing(place):
        if out is None:
            place = make_unused(_RUNS, name)
            made.insert(0, place)
        else:
            atomic.make_folder(place)
    try:
        with _locked(place):
            yield place
    finally:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def make_unused(parent: Path, name: str) -> Path:
    """Creates the first of ``name-1``, ``name-2``, ... that does not exist; safe against other processes."""
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
        except FileNotFoundError:  # another command has just removed the folder, which it had created
            atomic.make_folder(folder)
            lock = OwnedFile(folder / LOCK, make=True)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ESTALE):  # ESTALE: the other command has just ended
            raise UserError(f"{folder / LOCK}: {error.strerror}; fix this or give another --out") from None
        raise UserError(
            f"--out {folder}: another process is writing this run; wait until it ends, stop it, or give "
            "another --out"
        ) from None
    with lock:
        if os.fstat(lock.descriptor).st_size:
            raise UserError(
                f"{lock.path}: is not a lock of zoext, which is empty; move it away or give another --out"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                lock.path.unlink()  # before it is released, so that the next command creates its own
