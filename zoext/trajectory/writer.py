"""Writes files behind the back of a run."""

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

from zoext.trajectory.owned import OwnedFile

INTERVAL = 0.25  # seconds that what is put waits to be written together with what follows

#: Makes what is appended next to each file, in the order of the files.
Piece = Callable[[], tuple[bytes, ...]]


class BackgroundWriter:
    """Appends to files in a thread of its own, so that nobody waits for a disk or a device.

    What is put is on the disk half a second later, if the disk is fast enough. Files are written and
    synchronised in their order: a line of the last one may speak of what is in those before it. Where the
    system refuses a write the files keep what was written whole before, and the rest is kept to be tried
    again: by ``check``, ``flush`` and ``close``, each of which raises the error if there is one again, and
    once more when the writer is forgotten or the interpreter ends. What is lost then is told on stderr,
    unless ``close`` has raised the reason.

    What waits is kept in memory, without a bound: nothing is lost, and nobody waits, while a disk stalls.

    Args:
        files: are appended to, and closed at the end. Their locks are let go after a ``close`` that failed,
            until the next try.
    """

    def __init__(self, *files: OwnedFile) -> None:
        self._tail = _Tail(files)
        self._process = os.getpid()
        # The thread does not hold the writer, so that one that is forgotten is closed and not kept for ever.
        self._thread = threading.Thread(target=self._tail.run, name="zoext trajectory", daemon=True)
        self._thread.start()
        self._forgotten = weakref.finalize(self, _forget, self._tail, self._thread, self._process)

    def put(self, piece: Piece) -> None:
        """Appends what ``piece()`` returns; it is called in the thread, in the order of these calls.

        One that raises is called again.
        """
        self._tail.put(piece)

    def check(self) -> None:
        """Raises the error at which writing ended, if it ends there again. Waits only after an error.

        Raises:
            RuntimeError: in a fork of the process: the thread is not in it.
        """
        self._check_process()
        if self._tail.error is not None:
            self.flush()

    def flush(self) -> None:
        """Waits until all that was put is on the disk.

        Raises:
            OSError: if the system refused to write it.
            RuntimeError: in a fork of the process.
        """
        self._check_process()
        self._tail.flush()
        self._raise()

    def close(self) -> None:
        """Writes what was put and ends the thread. Raises as ``flush``. In a fork it does nothing.

        Where it raises, or is interrupted, all that is unwritten is still there: close again.
        """
        if os.getpid() != self._process:
            return
        self._tail.close()
        self._tail.is_told = self._tail.error is not None
        self._raise()
        self._thread.join()
        self._forgotten.detach()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self._tail.name} is written by process {self._process}, of which this one is a fork; "
                "take steps there, or close() the trajectory here"
            )

    def _raise(self) -> None:
        error = self._tail.error
        if error is not None:
            # A copy: what is raised holds this writer, and the thread, which holds the error, must not.
            raise copy.copy(error) from error


def _forget(tail: _Tail, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:
        return
    tail.forget()
    if thread is not threading.current_thread():  # which may be the one that collects garbage
        thread.join()


class _Tail:
    """The ends of the files, and what is still to be appended."""

    def __init__(self, files: tuple[OwnedFile, ...]) -> None:
        self._files = files
        self._sizes = [os.fstat(file.descriptor).st_size for file in files]  # of what is whole
        self._changed = threading.Condition()
        self._waiting: deque[Piece] = deque()
        self._torn = [False for _ in files]  # whether a part of what was refused is still there
        self._unwritten = [bytearray() for _ in files]
        self._put = self._made = self._done = self._tries = 0
        self._hurry = 0  # how many pieces somebody waits for
        self._closing = self._forgotten = self._ended = False
        self.is_told = False  # whether somebody knows that what is unwritten may be lost
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
        """Returns when all is written, or one more try has failed."""
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
        """Returns when all is written and the thread ends, or one more try has failed."""
        with self._changed:
            self._closing = not self._ended
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._closing)

    def forget(self) -> None:
        """Ends the thread after one more try."""
        with self._changed:
            self._forgotten = True
            self._changed.notify_all()

    def run(self) -> None:
        while not self._ended:
            closing, is_last = self._wait()
            error = self._try()
            if closing and error is not None:
                for file in self._files:
                    file.let_go()
            with self._changed:
                self.error = error
                self._tries += 1
                if error is None:
                    self._done = self._made
                else:
                    self._hurry = self._done  # whoever waits is told
                self._ended = is_last or (closing and error is None)
                if closing or self._ended:
                    self._closing = False
                self._changed.notify_all()
        for file in self._files:
            file.close()
        self._tell_what_is_lost()

    def _wait(self) -> tuple[bool, bool]:
        """Until some time after something was put. Whether somebody closes, and whether none is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._made < self._put or self._is_urgent())
            until = time.monotonic() + INTERVAL
            while not self._is_urgent() and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._closing, self._forgotten

    def _is_urgent(self) -> bool:
        return self._closing or self._forgotten or self._hurry > self._done

    def _tell_what_is_lost(self) -> None:
        lost = self._put - self._done
        if lost and not self.is_told and sys.stderr is not None:
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
                file.hold()
            for i, unwritten in enumerate(self._unwritten):
                if unwritten:
                    self._append(i, bytes(unwritten))
                    self._sizes[i] += len(unwritten)
                    unwritten.clear()
        except BaseException as error:
            return error
        return None

    def _append(self, i: int, data: bytes) -> None:
        """Appends ``data`` to a file, all of it or nothing."""
        file, size = self._files[i].descriptor, self._sizes[i]
        try:
            if self._torn[i]:
                self._cut(i)
            if os.fstat(file).st_size != size:
                raise OSError(errno.EBUSY, "somebody else writes to this file too")
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
        os.ftruncate(
            self._files[i].descriptor, self._sizes[i]
        )  # whole lines only; to shorten a file needs no room
        self._torn[i] = False
