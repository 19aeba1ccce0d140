"""The subcommands and their help. Imports neither torch nor any subcommand that is not chosen."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from zoext import __version__
from zoext.cli._errors import UserError


@dataclass(frozen=True)
class Command:
    """A subcommand: a module in ``_commands`` with EXAMPLES, ``add_arguments`` and ``run``."""

    help: str
    #: Whether the processes of torchrun run it together; otherwise the first one runs it alone.
    of_all_ranks: bool = True


COMMANDS = {
    "finetune": Command("Fine-tune a language model on your data; without arguments, run a demo."),
    "compare": Command("Compare optimizers at equal forward passes, each at its own best learning rate."),
    "evaluate": Command("Evaluate the model of a run, or any other, on examples.", of_all_ranks=False),
    "predict": Command("Answer the rows of a file with the model of a run.", of_all_ranks=False),
    "replay": Command("Recompute a tuned model from its base and its trajectory, bit for bit."),
    "visualize": Command(
        "Draw optimizers on functions of two variables, a slice of a loss, or curves of runs.",
        of_all_ranks=False,
    ),
    "bench": Command("Measure the kernels on this machine against its limits.", of_all_ranks=False),
    "info": Command("Show versions, build, instruction sets and devices.", of_all_ranks=False),
}

_EXAMPLES = """\
examples:
  zoext finetune --model roberta-base --data reviews.csv --steps 5000 --out runs/reviews
  zoext finetune --out runs/reviews --resume
  zoext replay roberta-base runs/reviews --to-step 1000 --out runs/earlier

zoext COMMAND --help explains a command, with examples.
"""

_USER_ERROR = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parsed(arguments: Sequence[str], chosen: str) -> tuple[argparse.Namespace, Any]:
    """The options of the subcommand ``chosen``, and its module.

    Raises:
        UserError: for options that it does not accept.
    """
    parser, module = _parser(chosen)
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(
            f"unrecognized arguments: {' '.join(unknown)}; zoext {chosen} --help lists the options"
        )
    del found.command
    return found, module


def answer(arguments: Sequence[str], name: str | None) -> int:
    """Answers ``arguments`` that name no subcommand, but maybe ask for help; returns the exit code."""
    if os.environ.get("RANK", "0") != "0":  # the first process of torchrun answers
        return 0 if {"-h", "--help", "--version"} & set(arguments) else _USER_ERROR
    parser, _ = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return _USER_ERROR
    try:
        if name is not None:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            guess = f"did you mean '{close[0]}'? " if close else ""
            raise UserError(f"{name}: there is no such command; {guess}zoext --help lists them all")
        parser.parse_args(arguments)
    except UserError as error:
        print(f"zoext: error: {error}", file=sys.stderr)
    return _USER_ERROR


def _parser(chosen: str | None = None) -> tuple[argparse.ArgumentParser, Any]:
    parser = _Parser(
        prog="zoext",
        description="Fine-tune PyTorch models with forward passes only.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zoext {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    module: Any = None
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help)
        if name == chosen:
            module = importlib.import_module(f"zoext.cli._commands.{name}")
            sub.description, sub.epilog = module.__doc__, f"examples:\n{module.EXAMPLES}"
            sub.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(sub)
    return parser, module
