"""The options that all benchmarks share."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from zoext.benchmarking.dense_pass import Shape, opt_shapes


def add_measuring_arguments(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """How to measure, and where to write the figures."""
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the figures here as well")
    parser.add_argument(
        "--device",
        type=_device,
        default=torch.device("cpu"),
        help="where to measure; default: %(default)s",
    )
    parser.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="default: %(default)s"
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        default=repeats,
        help="rounds, after one to warm up; default: %(default)s",
    )


def writable(text: str) -> Path:
    """A file that can be written to later: what was measured for an hour should not be lost then."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that can be written to, not {text}")
    return path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the OPT decoder; the defaults are OPT-125M."""
    parser.add_argument("--layers", type=positive, default=12, help="default: %(default)s")
    parser.add_argument("--width", type=positive, default=768, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=positive, default=50272, help="default: %(default)s")


def shapes_of(arguments: argparse.Namespace) -> list[Shape]:
    return opt_shapes(layers=arguments.layers, width=arguments.width, vocabulary=arguments.vocabulary)


def describe(shapes: list[Shape]) -> str:
    elements = sum(math.prod(shape) for shape in shapes)
    return f"{elements / 1e6:.2f} million parameters in {len(shapes)} tensors"


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as plain data, without where the figures go and what a command's parser adds."""
    plain = {
        name: str(value) if isinstance(value, torch.device) else value
        for name, value in vars(arguments).items()
    }
    return {name: value for name, value in plain.items() if isinstance(value, int | float | str)}


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, not {text}") from None


def positive(text: str) -> int:
    """For ``type`` of an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value
