"""Bias of updates of weights in 16 bits over many steps: a small pull that is the same in every step.

    python benchmarks/precision_bias.py --threads 1 --json precision_bias.json

All weights are +-1.5 / 64 and decay by a given part of their unit in the last place a step: once alone, and
once together with a random direction of NOISE units, as in training. What is wanted is what the same steps
make of float64 weights. The error is what was taken less what was wanted, counted along the decay, in units
in the last place: -30 where 30 units were wanted and none taken. Float32 weights are there to compare with.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from rounded_weights import PRECISIONS, RoundedWeights, steps_of
from torch import Tensor

from zoext import noise
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report
from zoext._benchmarking.timing import Measurement, threads

START = 1.5 / 64
UNITS = {torch.bfloat16: 2.0**-13, torch.float16: 2.0**-16}  # in the last place of START
PULLS = (0.003, 0.001, 0.0003)  # units a step
NOISE = 0.1  # units a step: deviation of the random direction
AT_ONCE = 500  # steps in a pass
RIVALS = (*PRECISIONS, "float32")
FIRST_SEED = 83


class Bias(NamedTuple):
    """The error of the elements, in units in the last place: its mean, the error of that, and the size."""

    mean: float
    standard_error: float
    root_mean_square: float

    @classmethod
    def of(cls, errors: Tensor) -> Bias:
        return cls(
            errors.mean().item(),
            errors.std().item() / len(errors) ** 0.5,
            errors.square().mean().sqrt().item(),
        )


def biases(
    dtype: torch.dtype, pull: float, noise_units: float, seed: int, arguments: argparse.Namespace
) -> dict[str, Bias]:
    """After ``arguments.steps`` steps, by precision."""
    unit = UNITS[dtype]
    signs = noise.normal((arguments.elements,), seed=seed).sign()
    rivals = {name: RoundedWeights(signs * START, dtype, name) for name in PRECISIONS}
    rivals["float32"] = RoundedWeights(signs * START, torch.float32, "nearest")
    exact = RoundedWeights(signs * START, torch.float64, "nearest")
    for first in range(0, arguments.steps, AT_ONCE):
        count = min(AT_ONCE, arguments.steps - first)
        steps = steps_of(seed + 1 + first, count, noise_units * unit, pull * unit / START)
        for weights in (*rivals.values(), exact):
            weights.move(*steps)
    return {
        name: Bias.of(-signs * (weights.whole() - exact.whole()) / unit) for name, weights in rivals.items()
    }


def add(report: Report, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    seeds = [FIRST_SEED + 10**6 * number for number in range(arguments.repeats)]
    for noise_units, company in ((0.0, "alone"), (NOISE, "in noise")):
        for pull in PULLS:
            rounds = [biases(dtype, pull, noise_units, seed, arguments) for seed in seeds]
            wanted = pull * arguments.steps
            for name in RIVALS:
                label = f"{str(dtype).removeprefix('torch.')}, {wanted:g} units wanted, {company}: {name}"
                for field in Bias._fields:
                    values = Measurement(tuple(getattr(found[name], field) for found in rounds))
                    report.add(f"{label}, {field.replace('_', ' ')}", values, "units")


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_count(parser, "--elements", 40_003)
    options.add_count(parser, "--steps", 10_000)
    options.add_count(parser, "--repeats", 3, "seeds")
    options.add_threads_and_json_arguments(parser)
    arguments = parser.parse_args()
    title = f"{arguments.steps} small decays of {arguments.elements} weights of 16 bits"
    report = Report(title, options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in UNITS:
            add(report, dtype, arguments)
    report.note("mean and root mean square: of (taken - wanted) along the decay, in units in the last place.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
