"""Runs a subcommand: on the ranks of torchrun, with errors and signals as exit codes."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from zoext.cli._errors import UserError, missing_package, wants_traceback
from zoext.cli._parser import COMMANDS, parsed
from zoext.cli._ranks import Ranks
from zoext.cli._terminal import exit_code_of, terminable


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs ``zoext ARGUMENTS`` with the subcommand ``name`` and returns its exit code."""
    ranks = Ranks.of_environment()
    try:
        with terminable(), ranks.printing_once():
            return _run(name, arguments, ranks)
    except UserError as error:
        if wants_traceback():
            traceback.print_exception(error)
        return ranks.fail(f"error: {error}", 2)
    except KeyboardInterrupt as error:
        return ranks.fail("interrupted", exit_code_of(error))
    except Exception as error:
        if (package := missing_package(error)) is not None and not wants_traceback():
            return ranks.fail(f"error: {package}", 2)
        if (code := ranks.code_after(error)) is None:
            raise
        return code


def _run(name: str, arguments: Sequence[str], ranks: Ranks) -> int:
    options, module = parsed(arguments, name)
    if not COMMANDS[name].of_all_ranks:
        return int(module.run(options)) if ranks.is_first else 0
    if not ranks.is_first:
        options.quiet = True
    with ranks.joined():
        return int(module.run(options, ranks))
