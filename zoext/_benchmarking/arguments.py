"""Command-line options that benchmarks share."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from zoext._benchmarking.dense_pass import Shape, opt_shapes


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose description, a module's docstring, keeps its line breaks."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_measuring_arguments(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """Adds how to measure, and where to write the figures."""
    add_json_argument(parser)
    parser.add_argument(
        "--device",
        type=_device,
        default=torch.device("cpu"),
        help="where to measure; default: %(default)s",
    )
    add_count(parser, "--threads", torch.get_num_threads(), "processor threads")
    add_count(parser, "--repeats", repeats, "rounds, after a warm-up round")


def add_threads_and_json_arguments(parser: argparse.ArgumentParser) -> None:
    """For a program that runs only on the CPU and repeats in its own way."""
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    add_json_argument(parser)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds where to write the figures."""
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write the figures to this file")


def add_count(parser: argparse.ArgumentParser, name: str, default: int, meaning: str = "") -> None:
    """Adds an integer of at least 1, whose help ends with the default."""
    help_text = f"{meaning}; default: %(default)s" if meaning else "default: %(default)s"
    parser.add_argument(name, type=positive, default=default, help=help_text)


def writable(text: str) -> Path:
    """The type of a path that is checked before an hour of measurements could be lost."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a writable folder, not {text}")
    return path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the size of the OPT decoder; the defaults are those of OPT-125M."""
    add_count(parser, "--layers", 12, "of the decoder")
    add_count(parser, "--width", 768, "of its hidden states")
    add_count(parser, "--vocabulary", 50272, "tokens")


def shapes_of(arguments: argparse.Namespace) -> list[Shape]:
    """The parameter shapes of the OPT decoder of ``add_model_arguments``."""
    return opt_shapes(layers=arguments.layers, width=arguments.width, vocabulary=arguments.vocabulary)


def describe(shapes: list[Shape]) -> str:
    """The number of parameters and tensors."""
    elements = sum(math.prod(shape) for shape in shapes)
    return f"{elements / 1e6:.2f} million parameters in {len(shapes)} tensors"


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as plain data, without paths and objects."""
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
    """The type of an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value
