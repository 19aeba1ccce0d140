"""Files that only one recording at a time may append to."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class OwnedFile:
    """A file opened for appending, with an exclusive lock (``flock``).

    The lock ends with the process, however it ends. A child made with ``os.fork``, such as a worker of a
    DataLoader, does not inherit it: the child closes its copy of the descriptor at once. On a file system
    without locks, the file is opened without one.

    Args:
        path: the file. It must exist, except with ``make``.
        make: create the file if it is missing.

    Raises:
        BlockingIOError: if another recording has the lock.
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path, *, make: bool = False) -> None:
        self.path = path
        self._place = path.absolute()  # stays valid if the process changes its working directory
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if make else 0), 0o666)
        _open_files.add(self)
        try:
            self.lock()
        except BaseException:
            self.close()
            raise

    def lock(self) -> None:
        """Takes the lock, unless it is held already, and checks that the path still leads to this file.

        Raises:
            BlockingIOError: if another recording has the lock.
            OSError: if the file was moved, removed or replaced.
        """
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = "is written by another recording, here or in another process; close() that one first"
            raise BlockingIOError(errno.EAGAIN, why, str(self.path)) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        if not self._is_at_path():
            why = "was moved, removed or replaced during the recording; put it back"
            raise OSError(errno.ESTALE, why, str(self.path))

    def unlock(self) -> None:
        """Releases the lock until the next ``lock``."""
        with suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Closes the file, which also releases the lock."""
        _open_files.discard(self)
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._place), os.fstat(self.descriptor))
        except (FileNotFoundError, NotADirectoryError):
            return False


_open_files: weakref.WeakSet[OwnedFile] = weakref.WeakSet()


def _close_copies() -> None:
    for file in list(_open_files):
        file.close()


# flock locks belong to the open file description, which a fork shares: a child that outlives a killed run
# would keep its lock.
os.register_at_fork(after_in_child=_close_copies)
