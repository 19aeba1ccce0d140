"""Updates of weights in 16 bits: how much of a step is taken, for each precision and for the baseline.

    python benchmarks/precision.py --threads 1 --json precision.json

Weights are normal with a deviation of .02, a step is ``lr g z`` with a new z each time. What is wanted of one
or many steps is their sum; what is taken is what the weights moved, which for precision="residual" are floats
of 24 bits. The baseline rounds z as well; it is asked for the z that it drew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from rounded_weights import PRECISIONS, RoundedWeights, steps_of
from torch import Tensor

from zoext import noise
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report
from zoext._benchmarking.timing import Measurement, threads

DEVIATION = 0.02
SIZES = (1e-5, 1e-6, 1e-7)  # lr times the projected gradient
DTYPES = (torch.bfloat16, torch.float16)
BASELINE = "baseline"
FIRST_SEED = 71


class Moved(NamedTuple):
    """What became of steps, and what should have: float64, of the shape of the weights."""

    taken: Tensor
    wanted: Tensor


class Share(NamedTuple):
    """How much of the wanted change was taken."""

    changed: float
    cosine: float
    length: float

    @classmethod
    def of(cls, moved: Moved) -> Share:
        taken, wanted = moved
        along = torch.dot(taken, wanted)
        lengths = taken.norm() * wanted.norm()
        return cls(
            changed=100 * (taken != 0).double().mean().item(),
            cosine=(along / lengths).item() if lengths > 0 else 0.0,
            length=(along / torch.dot(wanted, wanted)).item(),
        )


UNITS = {"changed": "%", "cosine": "", "length": ""}


def start(elements: int, seed: int) -> Tensor:
    return noise.normal((elements,), seed=seed) * DEVIATION


def fused(elements: int, seed: int, dtype: torch.dtype, precision: str, size: float, steps: int) -> Moved:
    """By the operator of this package, all steps in one pass over the weights."""
    weights = RoundedWeights(start(elements, seed), dtype, precision)
    exact = RoundedWeights(weights.theta.float(), torch.float64, "nearest")
    before = weights.whole()
    for each in (weights, exact):
        each.move(*steps_of(seed + 1, steps, -size))
    return Moved(weights.whole() - before, exact.whole() - before)


def baseline(elements: int, seed: int, dtype: torch.dtype, size: float, steps: int) -> Moved:
    """As the script of MeZO (arXiv 2305.17333) and its forks update: z in the dtype of the weights."""
    theta = start(elements, seed).to(dtype)
    before, wanted = theta.double(), torch.zeros(elements, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        z = torch.normal(mean=0.0, std=1.0, size=theta.shape, dtype=dtype, generator=generator)
        theta = theta - size * z
        wanted.add_(z, alpha=-size)
    return Moved(theta.double() - before, wanted)


def ways(dtype: torch.dtype) -> dict[str, Callable[[int, int, float, int], Moved]]:
    """By name, each a function of elements, seed, size and steps."""

    def of_precision(precision: str) -> Callable[[int, int, float, int], Moved]:
        return lambda elements, seed, size, steps: fused(elements, seed, dtype, precision, size, steps)

    return {
        **{precision: of_precision(precision) for precision in PRECISIONS},
        BASELINE: lambda elements, seed, size, steps: baseline(elements, seed, dtype, size, steps),
    }


def add(report: Report, dtype: torch.dtype, size: float, steps: int, arguments: argparse.Namespace) -> None:
    seeds = [FIRST_SEED + 1000 * number for number in range(arguments.repeats)]
    for name, way in ways(dtype).items():
        shares = [Share.of(way(arguments.elements, seed, size, steps)) for seed in seeds]
        label = f"{str(dtype).removeprefix('torch.')}, lr g {size:.0e}, {steps} steps: {name}"
        for field, unit in UNITS.items():
            rounds = Measurement(tuple(getattr(share, field) for share in shares))
            report.add(f"{label}, {field}", rounds, unit)


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_count(parser, "--elements", 4_000_037)
    options.add_count(parser, "--steps", 100, "beside one")
    options.add_count(parser, "--repeats", 3, "seeds")
    options.add_threads_and_json_arguments(parser)
    arguments = parser.parse_args()
    title = f"Steps lr g z on {arguments.elements / 1e6:.2f} million weights of 16 bits"
    report = Report(title, options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in DTYPES:
            for size in SIZES:
                for steps in (1, arguments.steps):
                    add(report, dtype, size, steps, arguments)
    report.note("changed: elements that moved; cosine: of the taken to the wanted change;")
    report.note("length: <taken, wanted> / <wanted, wanted>. Measurement are seeds.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
