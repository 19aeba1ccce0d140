"""A command whose output nobody reads any more, as after ``| head``, ends without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "zoext", "info"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")
