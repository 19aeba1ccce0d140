"""The command ``zoext``. Its interface is the command line: ``main`` is the only public name.

What is imported here answers ``zoext --help``; the rest is imported when a subcommand is chosen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from zoext.cli._parser import COMMANDS, answer

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``zoext ARGUMENTS`` and returns its exit code.

    It is 0, 2 for a user error, 130 after Ctrl-C and 143 after SIGTERM.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    name = next((argument for argument in given if not argument.startswith("-")), None)
    if name not in COMMANDS:
        return answer(given, name)
    if "torch" not in sys.modules:
        # OpenMP reads it while torch is imported. By default, threads that have nothing to do spin until the
        # next operator. Where other programs need the cores, they are preempted with work in their hands, and
        # all others spin until they are back: two threads took 1.5 forwards per second in place of 14.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from zoext.cli import _running

    return _running.run(name, given)
