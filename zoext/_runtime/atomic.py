"""Writes files and folders atomically and durably: after a power cut each is complete or absent."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_DIGITS = 7  # of a process ID; on Linux they are below 2^22


def write_text(path: Path, text: str) -> None:
    """Writes the file ``path`` atomically, replacing an existing one."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the file ``path`` atomically, replacing an existing one."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def copy_tail(source: Path, start: int, path: Path) -> None:
    """Copies ``source`` from byte ``start`` to the file ``path``, atomically, replacing an existing one."""
    with _replacing(path) as temporary, source.open("rb") as read, temporary.open("wb") as written:
        read.seek(start)
        shutil.copyfileobj(read, written)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file, which replaces ``path`` at the end of the block unless the block raises."""
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
    """Creates the file ``path`` atomically.

    On a file system without hard links it is created first and then written, so a killed process or a power
    cut may leave an incomplete file.

    Raises:
        FileExistsError: if it exists, or another process creates it at the same time.
    """
    temporary = _temporary(path)
    # Left by a killed process with the same ID. It may be a hard link to that process's file: not truncated.
    temporary.unlink(missing_ok=True)
    try:
        _create(temporary, text)
        _link(temporary, path, text)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.absolute().parent)


def _link(temporary: Path, path: Path, text: str) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, fails if path exists
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _create(path, text)  # no hard links here, and a rename might replace the file of another process


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
    """Creates the folder ``path`` and its missing parents, and makes their names durable."""
    missing = [folder for folder in (path.absolute(), *path.absolute().parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


@contextmanager
def new_folder(
    path: Path, *, replace: bool = False, check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A temporary folder beside ``path``, which is renamed to ``path`` at the end of the block.

    Args:
        path: the folder to create.
        replace: replace an existing folder. At every moment the old or the new folder exists: if the process
            is killed between the two renames, ``where`` finds the old one.
        check: called just before the rename. If it or the block raises, ``path`` is unchanged.

    Raises:
        FileExistsError: if ``path`` exists, except a folder with ``replace``.
    """
    if os.path.lexists(path) and not (replace and path.is_dir()):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same ID
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
    """Gives all files the mode that the umask allows, and writes everything to the disk."""
    mode = folder.stat().st_mode & 0o666
    for inside in [*folder.rglob("*"), folder]:
        if inside.is_file():
            inside.chmod(mode)  # safetensors makes them readable only by their owner
        sync(inside)


def _move(temporary: Path, path: Path) -> None:
    aside = _aside(path)
    if path.is_symlink():  # only the link is replaced, not its target
        path.unlink()
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)  # left by a process killed after its renames
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
    """The folder ``path``, or the place of the old one if a process was killed while replacing it."""
    aside = _aside(path)
    return aside if aside.is_dir() and not path.exists() else path


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files that killed processes left while writing ``path``.

    Restores a folder that one of them was about to replace, if the new one is missing.
    """
    aside = _aside(path)
    if where(path) == aside:
        aside.replace(path)
    if aside.is_dir():
        shutil.rmtree(aside)
    remove_leftovers_of(path.parent, re.escape(path.name))


def remove_leftovers_of(folder: Path, names: str) -> None:
    """Removes the temporary files of killed processes in ``folder``, for files that match ``names``."""
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
    if process == os.getpid():  # this process writes nothing now, so a killed one had the same ID
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # In the same folder, because a rename is atomic only within one file system.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old.tmp")
