"""The command ``zoext``. Its interface is the command line: ``main`` is the only public name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from zoext.cli._commands import bench, compare, finetune, info, replay
from zoext.cli._errors import UserError

__all__ = ["main"]

_COMMANDS = {"finetune": finetune, "compare": compare, "replay": replay, "bench": bench, "info": info}

_INTERRUPTED = 130  # the exit code that shells report for SIGINT


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="zoext", description="Fine-tune PyTorch models with forward passes only.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(name, help=command.HELP, description=command.__doc__)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``zoext ARGUMENTS`` and returns its exit code: 0, 2 for a user error, 130 after Ctrl-C."""
    try:
        parsed = _parser().parse_args(arguments)
        run = parsed.run
        del parsed.run
        return int(run(parsed))
    except UserError as error:
        print(f"zoext: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zoext: interrupted", file=sys.stderr)
        return _INTERRUPTED
