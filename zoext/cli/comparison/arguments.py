"""The options of ``zoext compare``."""

from __future__ import annotations

import argparse

from zoext.cli import numbers, options
from zoext.cli.comparison.settings import DEMO, EVALUATIONS, ComparisonSettings, of_papers
from zoext.cli.optimizers import OPTIMIZERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; one that is not given is not in the namespace."""
    parser.argument_default = argparse.SUPPRESS
    usual = ComparisonSettings()
    defaults = options.Defaults(usual, DEMO)
    options.add_task(parser, defaults)
    what = parser.add_argument_group("what to compare", "defaults, and in brackets those of the demo")
    what.add_argument(
        "--optimizers",
        type=_methods,
        metavar="NAME,...",
        help=f"out of {', '.join(OPTIMIZERS)} (default {','.join(of_papers())})",
    )
    defaults.add(what, "forwards", numbers.count, "N", "forward passes of a run")
    defaults.add(what, "seeds", numbers.count, "N", "runs of each optimizer at its best lr: seeds 0 ... N-1")
    options.add_step(what, defaults)
    sweep = parser.add_argument_group("the sweep over learning rates")
    defaults.add(sweep, "lr", numbers.positive, "X", "MeZO's usual one on the task; others have theirs by it")
    sweep.add_argument(
        "--lrs", type=_lrs, metavar="NAME=X,...", help="usual ones by name, instead of those by --lr"
    )
    factors = ",".join(f"{factor:g}" for factor in usual.lr_factors)
    sweep.add_argument(
        "--lr-factors",
        type=_factors,
        metavar="X,...",
        help=f"the grid, times the usual lr (default {factors})",
    )
    sweep.add_argument(
        "--sweep-forwards",
        type=numbers.count,
        metavar="N",
        help="forward passes of a run (default --forwards)",
    )
    defaults.add(sweep, "sweep-seeds", numbers.count, "N", "runs at each lr: seeds 0 ... N-1")
    run = parser.add_argument_group("the comparison")
    run.add_argument(
        "--eval-every",
        type=numbers.count,
        metavar="N",
        help=f"forward passes between evaluations (default a {EVALUATIONS}th of --forwards)",
    )
    options.add_output(run, "runs/compare-N", "without the runs that are done")


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if len(set(names)) < len(names) or not set(names) <= OPTIMIZERS.keys():
        raise argparse.ArgumentTypeError(
            f"must be names out of {', '.join(OPTIMIZERS)}, once each, not {text}"
        )
    return names


def _factors(text: str) -> tuple[float, ...]:
    factors = sorted({numbers.positive(part) for part in text.split(",")})
    return tuple(factors)


def _lrs(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",")]
    unknown = [name for name, _, _ in pairs if name not in OPTIMIZERS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"must be NAME=X,... with names out of {', '.join(OPTIMIZERS)}, not {text}"
        )
    return {name: numbers.positive(lr) for name, _, lr in pairs}
