"""Appends to files in a background thread."""

from __future__ import annotations

import copy
import errno
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from zoext.trajectory._writer.owned_file import OwnedFile

INTERVAL = 0.25  # seconds that a piece waits to be written together with later ones

#: Makes the bytes to append to each file, in the order of the files.
Piece = Callable[[], tuple[bytes, ...]]


class BackgroundWriter:
    """Appends to files in a thread, so that the caller waits neither for the disk nor for the device.

    A piece reaches the disk within half a second if the disk is fast enough. Files are written and
    synchronised in their order, so data in the last file may refer to data in those before it.

    If a write fails, the files keep the pieces that are complete, and the others stay in memory. ``check``,
    ``flush`` and ``close`` retry the write and raise the error if it fails again. The last retry is when the
    writer is garbage-collected or the interpreter exits. Lost pieces are then reported on stderr, unless
    ``close`` has already raised the error.

    Unwritten pieces are kept in memory without a limit: nothing is lost and nobody waits while a disk stalls.

    Args:
        files: the files to append to. The writer closes them at the end, and unlocks them after a ``close``
            that failed, until the next retry.
    """

    def __init__(self, *files: OwnedFile) -> None:
        self._queue = _Queue(files)
        self._process = os.getpid()
        # The thread has no reference to the writer, so that an abandoned writer is collected and closed.
        self._thread = threading.Thread(target=self._queue.run, name="zoext trajectory", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _abandon, self._queue, self._thread, self._process)

    def put(self, piece: Piece) -> None:
        """Appends the bytes that ``piece()`` returns. The thread calls the pieces in the order of ``put``.

        A piece that raises is called again at the next retry.
        """
        self._queue.put(piece)

    def check(self) -> None:
        """Retries a failed write and raises its error. Returns at once if none has failed.

        Raises:
            RuntimeError: in a fork of the process, which does not have the thread.
        """
        self._check_process()
        if self._queue.error is not None:
            self.flush()

    def flush(self) -> None:
        """Waits until all pieces so far are on the disk.

        Raises:
            OSError: if a write failed.
            RuntimeError: in a fork of the process.
        """
        self._check_process()
        self._queue.flush()
        self._raise()

    def close(self) -> None:
        """Writes all pieces and ends the thread. Raises like ``flush``. Does nothing in a fork.

        If it raises or is interrupted, the unwritten pieces are kept and it can be called again.
        """
        if os.getpid() != self._process:
            return
        self._queue.close()
        self._queue.is_reported = self._queue.error is not None
        self._raise()
        self._thread.join()
        self._finalizer.detach()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self._queue.name} is written by process {self._process}, of which this one is a fork; "
                "take steps there, or close() the trajectory here"
            )

    def _raise(self) -> None:
        error = self._queue.error
        if error is not None:
            # A copy: the traceback of a raised error refers to this writer, and the thread keeps the error.
            raise copy.copy(error) from error


def _abandon(queue: _Queue, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:
        return
    queue.abandon()
    if thread is not threading.current_thread():  # the garbage collector may run in the thread itself
        thread.join()


class _Queue:
    """The pieces that are to be appended, and the ends of the files."""

    def __init__(self, files: tuple[OwnedFile, ...]) -> None:
        self._files = files
        self._sizes = [os.fstat(file.descriptor).st_size for file in files]  # of the complete pieces
        self._changed = threading.Condition()
        self._waiting: deque[Piece] = deque()
        self._torn = [False for _ in files]  # whether a part of a failed write may still be in the file
        self._unwritten = [bytearray() for _ in files]
        self._put = self._made = self._done = self._tries = 0
        self._hurry = 0  # how many pieces a caller waits for
        self._closing = self._abandoned = self._ended = False
        self.is_reported = False  # whether the caller knows that unwritten pieces may be lost
        self.error: BaseException | None = None

    @property
    def name(self) -> Path:
        return self._files[-1].path

    def put(self, piece: Piece) -> None:
        with self._changed:
            self._waiting.append(piece)
            self._put += 1
            self._changed.notify_all()

    def flush(self) -> None:
        """Returns when all pieces are written or one more try has failed."""
        with self._changed:
            self._hurry = wanted = self._put
            tries = self._tries
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: (
                    self._done >= wanted or self._ended or (self.error is not None and self._tries > tries)
                )
            )

    def close(self) -> None:
        """Returns when all pieces are written and the thread is about to end, or one more try has failed."""
        with self._changed:
            self._closing = not self._ended
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._closing)

    def abandon(self) -> None:
        """Ends the thread after one more try."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def run(self) -> None:
        while not self._ended:
            closing, is_last = self._wait()
            error = self._try()
            if closing and error is not None:
                for file in self._files:
                    file.unlock()
            with self._changed:
                self.error = error
                self._tries += 1
                if error is None:
                    self._done = self._made
                else:
                    self._hurry = self._done  # flush() returns and raises the error
                self._ended = is_last or (closing and error is None)
                if closing or self._ended:
                    self._closing = False
                self._changed.notify_all()
        for file in self._files:
            file.close()
        self._report_lost()

    def _wait(self) -> tuple[bool, bool]:
        """Waits for pieces or a waiting caller. Returns whether to close, and whether it is abandoned."""
        with self._changed:
            self._changed.wait_for(lambda: self._made < self._put or self._is_urgent())
            until = time.monotonic() + INTERVAL
            while not self._is_urgent() and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._closing, self._abandoned

    def _is_urgent(self) -> bool:
        return self._closing or self._abandoned or self._hurry > self._done

    def _report_lost(self) -> None:
        lost = self._put - self._done
        if lost and not self.is_reported and sys.stderr is not None:
            error = self.error
            reason = error.strerror if isinstance(error, OSError) else repr(error)
            print(f"zoext: {self.name}: {reason}; its last steps are lost: {lost} of them", file=sys.stderr)

    def _try(self) -> BaseException | None:
        try:
            while self._made < self._put:
                for unwritten, data in zip(self._unwritten, self._waiting[0](), strict=True):
                    unwritten += data
                self._waiting.popleft()
                self._made += 1
            for file in self._files:
                file.lock()
            for i, unwritten in enumerate(self._unwritten):
                if unwritten:
                    self._append(i, bytes(unwritten))
                    self._sizes[i] += len(unwritten)
                    unwritten.clear()
        except BaseException as error:
            return error
        return None

    def _append(self, i: int, data: bytes) -> None:
        """Appends all of ``data`` to file ``i``, or nothing."""
        file, size = self._files[i].descriptor, self._sizes[i]
        try:
            if self._torn[i]:
                self._cut(i)
            if os.fstat(file).st_size != size:
                raise OSError(errno.EBUSY, "another program writes to this file too")
            self._torn[i] = True
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
            self._torn[i] = False
        except OSError as error:
            if self._torn[i]:
                with suppress(OSError):
                    self._cut(i)
            raise OSError(error.errno, error.strerror, str(self._files[i].path)) from None

    def _cut(self, i: int) -> None:
        # Shortening a file needs no room, so it works on a full disk.
        os.ftruncate(self._files[i].descriptor, self._sizes[i])
        self._torn[i] = False
