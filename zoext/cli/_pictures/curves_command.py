"""Draws the learning curves of any runs of zoext finetune together, over forward passes.

RUN is the --out of a run, which may still be running. The labels are the settings in which the runs differ,
or the names of the folders where these do not tell them apart.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from zoext.cli._pictures import curve_figure, curves, style
from zoext.cli._pictures.output import Output

HELP = "learning curves of several runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the runs."""
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="the --out of zoext finetune")


def draw(output: Output, *, runs: list[Path]) -> None:
    """Reads all runs before anything is written."""
    read = curves.read(runs)
    with style.new_figure(*curve_figure.size(read)) as figure:
        curve_figure.draw(figure, read)
        output.write(figure, {"curves": [dataclasses.asdict(curve) for curve in read]})
    output.say("\n".join(map(str, read)))
