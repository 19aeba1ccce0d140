"""A GPU put to the test: the bits of the CPU, then the speed of every operator and of whole steps.

    python benchmarks/gpu.py --json gpu.json

First every operator is compared with the CPU, bit for bit: where one differs, the program says where and
ends with status 1, before anything is timed. Then the operators are timed over the parameters of the first
size, and steps on a random decoder of each size, where transformers is installed. Status 2 means that there
is no GPU to be tested.

Nothing else should run on the GPU; locked clocks (nvidia-smi --lock-gpu-clocks) reduce the variance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec

import gpu_kernels
import gpu_steps
import torch
from gpu_correctness import checks
from mezo_step import MOST_REPEATS, too_many
from opt_model import require_transformers

import zoext
from zoext import ops
from zoext._benchmarking import arguments as options
from zoext._benchmarking.dense_pass import opt_shapes
from zoext._benchmarking.report import Report
from zoext._benchmarking.timing import threads

PARTS = ("kernels", "steps")


@dataclass(frozen=True)
class Size:
    """Of an OPT decoder (arXiv 2205.01068)."""

    layers: int
    width: int
    vocabulary: int = 50272


SIZES = {"125m": Size(12, 768), "1.3b": Size(24, 2048), "7b": Size(32, 4096)}


def named_size(text: str) -> tuple[str, Size]:
    """One of ``SIZES``, or any other as LAYERSxWIDTHxVOCABULARY."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if text not in SIZES and (len(numbers) != 3 or min(numbers) < 1):
        known = ", ".join(SIZES)
        raise argparse.ArgumentTypeError(f"must be {known} or LAYERSxWIDTHxVOCABULARY, not {text}")
    return text, SIZES.get(text) or Size(*numbers)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=9)
    parser.set_defaults(device=torch.device("cuda"))
    parser.add_argument(
        "--size",
        type=named_size,
        nargs="+",
        default=[("1.3b", SIZES["1.3b"]), ("7b", SIZES["7b"])],
        metavar="SIZE",
        help=f"{', '.join(SIZES)} or LAYERSxWIDTHxVOCABULARY; default: 1.3b 7b",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="what to time; default: all that the installed packages allow",
    )
    options.add_count(parser, "--elements", 4_000_003, "that each operator is compared on")
    options.add_count(parser, "--batch", 16, "examples of a step's forwards")
    options.add_count(parser, "--tokens", 256, "of each example")
    arguments = parser.parse_args(argv)
    if arguments.device.type != "cuda":
        parser.error(f"argument --device: must be cuda or cuda:N, not {arguments.device}")
    if arguments.parts is None:
        arguments.parts = PARTS if find_spec("transformers") else ("kernels",)
    if "steps" in arguments.parts and arguments.repeats > MOST_REPEATS:
        parser.error(f"argument --repeats: {too_many(arguments.repeats)}; --parts kernels takes more")
    return arguments


def missing(device: torch.device) -> str | None:
    """Why the GPU cannot be tested, and what to do; None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build: install a CUDA build"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU: does nvidia-smi list one, and does its driver suit?"
    if ops.cuda_missing is not None:
        return f"zoext's CUDA operators are missing ({ops.cuda_missing}): build them with make test-gpu"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device}: give --device cuda:0 to cuda:{torch.cuda.device_count() - 1}"
    return None


def compare(elements: int, device: torch.device) -> tuple[int, list[str]]:
    """How many checks there were, and where the device's bits are not those of the CPU."""
    results = {check.name: check.difference(device) for check in checks(elements)}
    return len(results), [f"{name}: {difference}" for name, difference in results.items() if difference]


def measure_kernels(report: Report, name: str, size: Size, arguments: argparse.Namespace) -> None:
    shapes = opt_shapes(**asdict(size))
    report.note(f"The operators went over {options.describe(shapes)}, those of {name}.")
    for dtype in gpu_kernels.DTYPES:
        where = dtype, arguments.device
        for make in (
            partial(gpu_kernels.dense, shapes, *where),
            partial(gpu_kernels.bias, size.width, *where),
            partial(gpu_kernels.adam, shapes, *where),
            partial(gpu_kernels.factored, shapes, *where),
            partial(gpu_kernels.bases, size.layers, size.width, *where),
            partial(gpu_kernels.linears, size.layers, size.width, *where),
        ):
            label = str(dtype).removeprefix("torch.")
            gpu_kernels.measure(report, make, label, repeats=arguments.repeats, device=arguments.device)


def measure_steps(report: Report, arguments: argparse.Namespace) -> None:
    report.note(f"A step's forwards were of {arguments.batch} x {arguments.tokens} tokens.")
    for name, size in arguments.size:
        of_this_size = argparse.Namespace(**vars(arguments) | asdict(size))
        gpu_steps.measure(report, of_this_size, f"{name}, bfloat16")


def report_of(arguments: argparse.Namespace) -> Report:
    names, parts = " ".join(name for name, _ in arguments.size), " ".join(arguments.parts)
    settings = options.settings_of(arguments) | {"size": names, "parts": parts}
    return Report(f"zoext {zoext.__version__} on a GPU: {parts}, {names}", settings)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = arguments_of(argv)
    obstacle = missing(arguments.device)
    if obstacle is not None:
        print(f"gpu.py: {obstacle}", file=sys.stderr)
        return 2
    if "steps" in arguments.parts:
        require_transformers()
    with torch.cuda.device(arguments.device), threads(arguments.threads):
        count, differences = compare(arguments.elements, arguments.device)
        if differences:
            print("Not the bits of the CPU:", *differences, sep="\n")
            return 1
        report = report_of(arguments)
        report.note(f"All bits of {count} checks on {arguments.elements} elements are those of the CPU.")
        if not find_spec("transformers"):
            report.note("Steps were left out: transformers, whose decoder they run, is not installed.")
        print(f"gpu.py: all bits of {count} checks are those of the CPU; measuring now", file=sys.stderr)
        try:
            if "kernels" in arguments.parts:
                measure_kernels(report, *arguments.size[0], arguments)
            if "steps" in arguments.parts:
                measure_steps(report, arguments)
        finally:  # an error late in an hour loses nothing that was measured before
            report.finish(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
