"""Probes of weights in 16 bits: how much of a displacement they hold, and what the baseline leaves behind.

    python benchmarks/probe_rounding.py --threads 1 --json probe_rounding.json

A streamed probe displaces by ``+mu z`` and ``-mu z``, each rounded to nearest; half their difference is what
a central difference sees. An element of AGZO's direction is smaller than one of MeZO's by the root of the
layer's inputs, here 768. The baseline adds mu z, -2 mu z and mu z, and leaves the rounding errors behind.
"""

from __future__ import annotations

import argparse

import torch
from precision import DTYPES, FIRST_SEED, UNITS, Moved, Share
from torch import Tensor

from zoext import noise, ops
from zoext._benchmarking import arguments as options
from zoext._benchmarking.dense_pass import baseline_perturb
from zoext._benchmarking.report import Report
from zoext._benchmarking.timing import Measurement, threads

MU = 1e-3
#: The mean and the deviation of weights: those of a matrix, and those of a norm.
WEIGHTS = {"N(0, .02)": (0.0, 0.02), "N(1, .1)": (1.0, 0.1)}
DISPLACEMENTS = {"mu 1e-3": MU, "mu 1e-2": 10 * MU}
OF_MATRICES = {f"AGZO, {name}": size / 768**0.5 for name, size in DISPLACEMENTS.items()}


def start(weights: str, elements: int, seed: int, dtype: torch.dtype) -> Tensor:
    mean, deviation = WEIGHTS[weights]
    return (noise.normal((elements,), seed=seed) * deviation + mean).to(dtype)


def displaced(theta: Tensor, size: float, seed: int) -> Moved:
    """Half of the difference between the weights of two probes."""
    seeds, span = torch.tensor([seed]), [ops.span_of(theta)]
    ends = []
    for coefficient in (size, -size):
        out = torch.empty_like(theta)
        ops.noise_copy_([out], [theta], seeds, torch.tensor([coefficient]), [0], span)
        ends.append(out.double())
    wanted = noise.normal(theta.shape, seed=seed).double() * size
    return Moved((ends[0] - ends[1]) / 2, wanted)


def left_behind(theta: Tensor, rounds: int) -> tuple[float, float]:
    """By so many rounds of the baseline: which share of the elements, how much of their root mean square.

    Both in percent.
    """
    own = theta.clone()
    for number in range(rounds):
        for factor in (1.0, -2.0, 1.0):
            baseline_perturb([own], number, factor, MU)
    change = own.double() - theta.double()
    return 100 * (change != 0).double().mean().item(), 100 * (change.norm() / theta.double().norm()).item()


def add_displacements(report: Report, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    for weights, (mean, _) in WEIGHTS.items():
        for name, size in (DISPLACEMENTS | ({} if mean else OF_MATRICES)).items():
            shares = [
                Share.of(displaced(start(weights, arguments.elements, seed, dtype), size, seed + 1))
                for seed in seeds_of(arguments)
            ]
            for field, unit in UNITS.items():
                values = Measurement(tuple(getattr(share, field) for share in shares))
                report.add(f"{name_of(dtype)}, {weights}, {name}: {field}", values, unit)


def add_left_behind(report: Report, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    for weights in WEIGHTS:
        for rounds in (1, arguments.steps):
            found = [
                left_behind(start(weights, arguments.elements, seed, dtype), rounds)
                for seed in seeds_of(arguments)
            ]
            label = f"{name_of(dtype)}, {weights}, baseline, {rounds} rounds"
            for name, values in zip(("changed", "drift"), zip(*found, strict=True), strict=True):
                report.add(f"{label}: {name}", Measurement(values), "%")


def seeds_of(arguments: argparse.Namespace) -> list[int]:
    return [FIRST_SEED + 1000 * number for number in range(arguments.repeats)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_count(parser, "--elements", 400_009)
    options.add_count(parser, "--steps", 100, "beside one")
    options.add_count(parser, "--repeats", 3, "seeds")
    options.add_threads_and_json_arguments(parser)
    arguments = parser.parse_args()
    report = Report(
        f"Probes of {arguments.elements / 1e6:.2f} million weights of 16 bits", options.settings_of(arguments)
    )
    with threads(arguments.threads), torch.random.fork_rng(devices=[]):
        for dtype in DTYPES:
            add_displacements(report, dtype, arguments)
            add_left_behind(report, dtype, arguments)
    report.note("changed: elements that are displaced, or are not what they were; cosine, length: as in")
    report.note("precision.py; drift: of the root mean square of the weights.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
