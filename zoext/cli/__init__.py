"""The command ``zoext``. Its interface is the command line: ``main`` is the only public name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from zoext.cli._commands import bench, compare, finetune, info, replay, visualize
from zoext.cli._errors import UserError
from zoext.cli._ranks import Ranks

__all__ = ["main"]

_OF_ALL_RANKS = {"finetune": finetune, "compare": compare, "replay": replay}
_OF_ONE_RANK = {"bench": bench, "info": info, "visualize": visualize}

_INTERRUPTED = 130  # the exit code that shells report for SIGINT


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="zoext", description="Fine-tune PyTorch models with forward passes only.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in {**_OF_ALL_RANKS, **_OF_ONE_RANK}.items():
        sub = commands.add_parser(name, help=command.HELP, description=command.__doc__)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_arguments(sub)
        sub.set_defaults(command=name)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``zoext ARGUMENTS`` and returns its exit code: 0, 2 for a user error, 130 after Ctrl-C."""
    ranks = Ranks.of_environment()
    try:
        with ranks.printing_once():
            return _run(_parser().parse_args(arguments), ranks)
    except UserError as error:
        return ranks.fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        return ranks.fail("interrupted", _INTERRUPTED)
    except Exception as error:
        if (code := ranks.code_after(error)) is None:
            raise
        return code


def _run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    name = arguments.command
    del arguments.command
    if name in _OF_ONE_RANK:
        return int(_OF_ONE_RANK[name].run(arguments)) if ranks.is_first else 0
    if not ranks.is_first:
        arguments.quiet = True
    with ranks.joined():
        return int(_OF_ALL_RANKS[name].run(arguments, ranks))
