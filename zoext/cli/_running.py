"""Runs a subcommand: on the ranks of torchrun, with errors and signals as exit codes."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence

from zoext.cli._errors import UserError, missing_package, wants_traceback
from zoext.cli._parser import COMMANDS, parsed
from zoext.cli._ranks import Ranks
from zoext.cli._terminal import exit_code_of, terminable

#: The exit code that shells report for a program that the end of its reader has ended.
_UNREAD = 128 + signal.SIGPIPE


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs ``zoext ARGUMENTS`` with the subcommand ``name`` and returns its exit code."""
    ranks = Ranks.of_environment()
    try:
        with terminable(), ranks.printing_once():
            done = _run(name, arguments, ranks)
            if sys.stdout is not None:  # closed
                sys.stdout.flush()
            return done
    except UserError as error:
        if wants_traceback():
            traceback.print_exception(error)
        return ranks.fail(f"error: {error}", 2)
    except KeyboardInterrupt as error:
        return ranks.fail("interrupted", exit_code_of(error))
    except BrokenPipeError:
        if not _is_unread():
            raise
        return _UNREAD
    except Exception as error:
        if (package := missing_package(error)) is not None and not wants_traceback():
            return ranks.fail(f"error: {package}", 2)
        if (code := ranks.code_after(error)) is None:
            raise
        return code


def _is_unread() -> bool:
    """Whether nobody reads stdout any more, as after ``| head``; then what is left of it is dropped."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or in place of a file
        return False
    poll = select.poll()
    poll.register(number, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def _run(name: str, arguments: Sequence[str], ranks: Ranks) -> int:
    options, module = parsed(arguments, name)
    if not COMMANDS[name].of_all_ranks:
        return int(module.run(options)) if ranks.is_first else 0
    if not ranks.is_first:
        options.quiet = True
    with ranks.joined():
        return int(module.run(options, ranks))
