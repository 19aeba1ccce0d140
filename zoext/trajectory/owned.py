"""Files that one recording at a time appends to."""

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
    """A file that exists, open to be appended to, with a lock that keeps other recordings out.

    On ``make`` it is made if it is missing. The lock ends with the process, however that ends. A child that
    was forked with ``os.fork``, such as a worker of a DataLoader, does not keep it: it closes its copy at
    once. Where the file system knows no locks there is none.

    Raises:
        BlockingIOError: if another recording has it.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path, *, make: bool = False) -> None:
        self.path = path
        self._place = path.absolute()  # also after the process has gone to another folder
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if make else 0), 0o666)
        _open_files.add(self)
        try:
            self.hold()
        except BaseException:
            self.close()
            raise

    def hold(self) -> None:
        """Takes the lock, if it was let go, and sees that the path still leads here.

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
            why = "was moved, removed or replaced while it was written; put it back"
            raise OSError(errno.ESTALE, why, str(self.path))

    def let_go(self) -> None:
        """Lets others have the file, until ``hold``."""
        with suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
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


# A lock belongs to all copies of a descriptor: a child that outlives a killed run would keep it.
os.register_at_fork(after_in_child=_close_copies)
