"""Progress is a bar in a terminal of any size, and a line now and then in a file or a pipe."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
import time
from contextlib import suppress

import pytest

from zoext.cli._bars import Lines, bar


def everything_from(leader: int) -> str:
    said = b""
    with suppress(OSError):  # when all is read
        while more := os.read(leader, 10_000):
            said += more
    os.close(leader)
    return said.decode()


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (24, 100), (24, 0)])
def test_a_terminal(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        shown = bar("step", 7, 2, quiet=False)
        shown.set_postfix_str("loss 0.5000")
        time.sleep(0.11)  # the bar is drawn ten times a second
        shown.update(3)
        shown.close()
    said = everything_from(leader)
    assert "5/7" in said
    assert "loss 0.5000" in said
    assert "\N{FULL BLOCK}" in said or "#" in said


def test_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    shown = bar("step", 100_000, 0, quiet=False)
    for _ in range(50_000):
        shown.update()
    shown.write("an evaluation")
    shown.close()
    assert capsys.readouterr() == ("an evaluation\n", "step 50000 of 100000, 0:00:00 left\n")


def test_lines_have_everything(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("forward", 10, 4, every=0.0)
    lines.set_description_str("mezo lr 0.001")
    lines.set_postfix_str("loss 0.25")
    lines.update(2)
    lines.total = 12
    lines.update(6)
    lines.close()  # says nothing new
    assert capsys.readouterr().err.splitlines() == [
        "mezo lr 0.001, forward 6 of 10, loss 0.25, 0:00:00 left",
        "mezo lr 0.001, forward 12 of 12, loss 0.25",
    ]


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    shown = bar("step", 3, 0, quiet=True)
    shown.update(3)
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_a_replaced_stderr_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    shown = bar("step", 3, 0, quiet=False)
    shown.update(3)
    shown.close()
    assert written.getvalue() == "step 3 of 3\n"
