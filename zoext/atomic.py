"""Files and folders that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces the file ``path`` in one step."""
    temporary = _temporary(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.absolute().parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` to fill, which becomes ``path`` at the end of the block.

    If the block raises, nothing has happened. ``path`` must not exist.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for inside in [*temporary.rglob("*"), temporary]:
            sync(inside)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def remove_leftovers(path: Path) -> None:
    """Removes what a killed process was in the middle of writing as ``path``, whose name may hold a ``*``."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # In the same folder: a rename is atomic only within a file system.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
