"""The options that all benchmarks share."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from zoext._benchmarking.dense_pass import Shape, opt_shapes


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """For a program whose docstring is the description: its lines stay as they are."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_measuring_arguments(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """How to measure, and where to write the figures."""
    add_json_argument(parser)
    parser.add_argument(
        "--device",
        type=_device,
        default=torch.device("cpu"),
        help="where to measure; default: %(default)s",
    )
    add_count(parser, "--threads", torch.get_num_threads())
    add_count(parser, "--repeats", repeats, "rounds, after one to warm up")


def add_threads_and_json_arguments(parser: argparse.ArgumentParser) -> None:
    """For a program that runs on the CPU alone and has its own way to repeat."""
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    add_json_argument(parser)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the figures here as well")


def add_count(parser: argparse.ArgumentParser, name: str, default: int, meaning: str = "") -> None:
    """An integer of at least 1, whose help ends with the default."""
    help_text = f"{meaning}; default: %(default)s" if meaning else "default: %(default)s"
    parser.add_argument(name, type=positive, default=default, help=help_text)


def writable(text: str) -> Path:
    """A file that can be written to later: what was measured for an hour should not be lost then."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that can be written to, not {text}")
    return path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the OPT decoder; the defaults are OPT-125M."""
    add_count(parser, "--layers", 12)
    add_count(parser, "--width", 768)
    add_count(parser, "--vocabulary", 50272)


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
