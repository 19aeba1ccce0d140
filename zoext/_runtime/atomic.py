"""Files and folders that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_DIGITS = 7  # of the number of a process; Linux has at most 2^22


def write_text(path: Path, text: str) -> None:
    """Replaces the file ``path`` in one step."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_tail(source: Path, start: int, path: Path) -> None:
    """Replaces the file ``path`` in one step by what ``source`` has from byte ``start`` on."""
    with _replacing(path) as temporary, source.open("rb") as read, temporary.open("wb") as written:
        read.seek(start)
        shutil.copyfileobj(read, written)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` at the end of the block, unless that raises."""
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.absolute().parent)


def create_text(path: Path, text: str) -> None:
    """Makes the file ``path``, there whole or not at all.

    On a file system without hard links it is made first and then written: a process that is killed in
    between, or a power cut, leaves a part of it.

    Raises:
        FileExistsError: if it is there, also if another process makes it at the same moment.
    """
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)  # of a process that was killed; it may be a second name of its file
    try:
        _create(temporary, text)
        _link(temporary, path, text)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.absolute().parent)


def _link(temporary: Path, path: Path, text: str) -> None:
    try:
        os.link(temporary, path)  # unlike a rename it replaces nothing
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _create(path, text)  # a file system without links: a rename might replace another's file


def _create(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise


def make_folder(path: Path) -> None:
    """Makes the folder ``path`` and those above it, as far as they are missing, with durable names."""
    missing = [folder for folder in (path.absolute(), *path.absolute().parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


@contextmanager
def new_folder(
    path: Path, *, replace: bool = False, check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A temporary folder beside ``path`` to fill, which becomes ``path`` at the end of the block.

    If the block raises, or ``check`` just before the move, nothing has happened. ``path`` must not exist,
    unless it is a folder to ``replace``: one of the two is there then at any moment, the old one for an
    instant ``where`` a killed process leaves it.
    """
    if os.path.lexists(path) and not (replace and path.is_dir()):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
    make_folder(temporary.parent)
    temporary.mkdir()
    try:
        yield temporary
        _finish(temporary)
        check()
        _move(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _finish(folder: Path) -> None:
    """Files get the usual mode, which the folder has from the umask, and all goes to the disk."""
    usual = folder.stat().st_mode & 0o666
    for inside in [*folder.rglob("*"), folder]:
        if inside.is_file():
            inside.chmod(usual)  # safetensors lets nobody but their owner read them
        sync(inside)


def _move(temporary: Path, path: Path) -> None:
    aside = _aside(path)
    if path.is_symlink():  # what it leads to is not ours
        path.unlink()
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed when it had moved
        path.replace(aside)
    try:
        temporary.replace(path)
    except BaseException:
        if aside.exists():
            aside.replace(path)
        raise
    sync(path.absolute().parent)
    if aside.exists():
        shutil.rmtree(aside)


def where(path: Path) -> Path:
    """Where the folder ``path`` is, if anywhere: aside, if a process was killed as it replaced it."""
    aside = _aside(path)
    return aside if aside.is_dir() and not path.exists() else path


def remove_leftovers(path: Path) -> None:
    """Removes what a killed process was in the middle of writing as ``path``.

    A folder that it was about to replace is put back, if nothing has taken its place.
    """
    aside = _aside(path)
    if where(path) == aside:
        aside.replace(path)
    if aside.is_dir():
        shutil.rmtree(aside)
    remove_leftovers_of(path.parent, re.escape(path.name))


def remove_leftovers_of(folder: Path, names: str) -> None:
    """Removes what killed processes were in the middle of writing in ``folder``; ``names`` is a pattern."""
    temporary = re.compile(rf"\.(?:{names})\.(\d{{1,{_DIGITS}}})\.tmp")
    for path in folder.iterdir() if folder.is_dir() else ():
        found = temporary.fullmatch(path.name)
        if found is None or path.is_symlink() or _is_another_alive(int(found[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_another_alive(process: int) -> bool:
    if process == os.getpid():  # and is in the middle of nothing; so it was one that had the same number
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old.tmp")
