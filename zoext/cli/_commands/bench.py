"""Measures this machine: the kernels against its limits, and against the standard PyTorch loop."""

from __future__ import annotations

import argparse

import torch

from zoext._benchmarking import arguments as options
from zoext._benchmarking.dense_pass import DensePass, add_rivals
from zoext._benchmarking.report import Report
from zoext._benchmarking.timing import interleaved, threads

HELP = "measure the kernels on this machine against its limits and the standard PyTorch loop"

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
    with threads(arguments.threads):
        for dtype in DTYPES:
            work = DensePass(shapes, dtype, arguments.device)
            times = interleaved(
                work.rivals(),
                repeats=arguments.repeats,
                device=arguments.device,
                seconds=arguments.seconds / len(DTYPES),
            )
            add_rivals(report, str(dtype).removeprefix("torch."), times, arguments.device)
    report.finish(arguments.json)
    return 0
