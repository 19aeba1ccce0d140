"""Writes files behind the back of a run."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

INTERVAL = 0.25  # seconds that what is put waits to be written together with what follows

#: Makes what is appended next to each file, in the order of the files.
Piece = Callable[[], tuple[bytes, ...]]


class BackgroundWriter:
    """Appends to files in a thread of its own, so that nobody waits for a disk or a device.

    What is put is on the disk half a second later, if the disk is fast enough. Files are written and
    synchronised in their order: a line of the last one may speak of what is in those before it. Where the
    system refuses a write the files keep what was written whole before, and ``check`` raises the error.

    Args:
        paths: the files, which exist and are appended to.
    """

    def __init__(self, *paths: Path) -> None:
        self._tail = _Tail(paths)
        # The thread does not hold the writer, so that one that is forgotten is closed and not kept for ever.
        self._thread = threading.Thread(target=self._tail.run, name="zoext trajectory", daemon=True)
        self._thread.start()
        self._finish = weakref.finalize(self, _finish, self._tail, self._thread)

    def put(self, piece: Piece) -> None:
        """Appends what ``piece()`` returns; it is called in the thread, in the order of these calls."""
        self._tail.put(piece)

    def check(self) -> None:
        """Raises the error at which writing ended, if it did."""
        if self._tail.error is not None:
            raise self._tail.error

    def flush(self) -> None:
        """Waits until all that was put is on the disk.

        Raises:
            OSError: if the system refused to write it.
        """
        self._tail.flush()
        self.check()

    def close(self) -> None:
        """Writes what was put and ends the thread. Raises as ``flush``."""
        self._finish()
        self.check()


def _finish(tail: _Tail, thread: threading.Thread) -> None:
    tail.close()
    if thread is not threading.current_thread():  # where the garbage is collected
        thread.join()


class _Tail:
    """The ends of the files, and what is still to be appended."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        self._files = [os.open(path, os.O_WRONLY | os.O_APPEND) for path in paths]
        self._changed = threading.Condition()
        self._waiting: list[Piece] = []
        self._put = self._done = 0
        self._hurry = 0  # how many pieces somebody waits for
        self._closed = False
        self.error: BaseException | None = None

    def put(self, piece: Piece) -> None:
        with self._changed:
            self._waiting.append(piece)
            self._put += 1
            self._changed.notify_all()

    def flush(self) -> None:
        with self._changed:
            self._hurry = wanted = self._put
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= wanted or self.error is not None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self) -> None:
        while pieces := self._next():
            try:
                self._write(pieces)
            except BaseException as error:
                self.error = error
            with self._changed:
                self._done += len(pieces)
                self._changed.notify_all()
        for file in self._files:
            os.close(file)

    def _next(self) -> list[Piece]:
        """What has been put, some time after it was; nothing when the end has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            until = time.monotonic() + INTERVAL
            while not self._closed and self._hurry <= self._done and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            pieces, self._waiting = self._waiting, []
        return pieces

    def _write(self, pieces: list[Piece]) -> None:
        if self.error is not None:  # a file must not go on after a gap
            return
        made = [piece() for piece in pieces]
        for file, path, data in zip(self._files, self._paths, zip(*made, strict=True), strict=True):
            _append(file, path, b"".join(data))


def _append(file: int, path: Path, data: bytes) -> None:
    before = os.fstat(file).st_size
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    except OSError as error:
        os.ftruncate(file, before)  # whole lines only; to shorten a file needs no room
        raise OSError(error.errno, error.strerror, str(path)) from None
