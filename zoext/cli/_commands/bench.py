"""Measures this machine: the kernels against its limits, and against the standard PyTorch loop."""

from __future__ import annotations

import argparse

import torch

from zoext._benchmarking import arguments as options
from zoext._benchmarking.dense_pass import DensePass, add_rivals
from zoext._benchmarking.report import Report
from zoext._benchmarking.timing import interleaved, threads
from zoext.cli import _options
from zoext.cli._ranks import ALONE

EXAMPLES = """\
  zoext bench
  zoext bench --threads 1 --layers 6 --width 512 --vocabulary 32000
  zoext bench --seconds 60 --repeats 20 --json bench.json
"""

DTYPES = (torch.float32, torch.bfloat16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_measuring_arguments(parser, repeats=3)
    options.add_model_arguments(parser)
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="start no round after this time; default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table and writes the JSON; returns the exit status."""
    shapes = options.shapes_of(arguments)
    report = Report(f"theta += c z over {options.describe(shapes)}", options.settings_of(arguments))
    device = _options.choose_device(str(arguments.device), ALONE)
    with threads(arguments.threads):
        for dtype in DTYPES:
            work = DensePass(shapes, dtype, device)
            times = interleaved(
                work.rivals(),
                repeats=arguments.repeats,
                device=device,
                seconds=arguments.seconds / len(DTYPES),
            )
            add_rivals(report, str(dtype).removeprefix("torch."), times, device)
    report.finish(arguments.json)
    return 0
