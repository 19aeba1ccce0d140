"""AGZO's bases of all activations of OPT-125M, against plain torch and the forward that makes these.

python benchmarks/power_iteration.py --threads 2 --json power_iteration.json
"""

from __future__ import annotations

import argparse

import torch
from opt_model import BATCH, TOKENS, closure_of, random_opt
from torch import Tensor

from zoext import noise, ops
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report, at_most
from zoext._benchmarking.timing import Measurement, interleaved, threads

RANK, ITERATIONS = 1, 3


class PowerIterations:
    """The inputs of a decoder's linear layers, and the ways to find their leading directions.

    Args:
        layers, width: the decoder's size. In a layer, three inputs of linear layers have ``width``
            features (queries, keys and values share one), and one has four times as many.
        dtype: float32, float64, bfloat16 or float16.
        device: where the activations are.
    """

    def __init__(self, layers: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        features = [width, width, width, 4 * width] * layers
        self.activations = [
            noise.normal((BATCH * TOKENS, d), seed=0, key=key, dtype=dtype, device=device)
            for key, d in enumerate(features)
        ]
        self._seed = torch.tensor([1], device=device)

    def plain(self) -> list[Tensor]:
        """As the paper has it: products and QR in torch, in float32."""
        bases = []
        for activations in self.activations:
            rows = activations.float()
            start = torch.randn(len(rows), RANK, device=rows.device)
            basis = torch.linalg.qr(rows.T @ start).Q
            for _ in range(ITERATIONS):
                basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
            bases.append(basis.T)
        return bases

    def fused(self) -> list[Tensor]:
        """The operator of this package."""
        return [
            ops.power_iteration(rows, None, self._seed, rank=RANK, iterations=ITERATIONS)[0]
            for rows in self.activations
        ]


def measure(dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Measurement]:
    closure = closure_of(random_opt(arguments, dtype), arguments)
    work = PowerIterations(arguments.layers, arguments.width, dtype, arguments.device)
    cases = {
        "forward": torch.no_grad()(closure),
        "plain power iterations": work.plain,
        "fused power iterations": work.fused,
    }
    return interleaved(cases, repeats=arguments.repeats, device=arguments.device)


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=9)
    options.add_model_arguments(parser)
    arguments = parser.parse_args()
    size = options.describe(options.shapes_of(arguments))
    title = f"Bases of rank {RANK} by {ITERATIONS} iterations for {size}, batch {BATCH} x {TOKENS}"
    report = Report(title, options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in (torch.float32, torch.bfloat16):
            times = measure(dtype, arguments)
            label = str(dtype).removeprefix("torch.")
            target = at_most(5) if (dtype, arguments.device.type) == (torch.float32, "cpu") else None
            share = times["fused power iterations"] / times["forward"]
            report.add_times(label, times)
            report.add(
                f"{label}: power iterations in a forward",
                Measurement(tuple(100 * s for s in share.rounds)),
                "%",
                target,
            )
            ratio = times["plain power iterations"] / times["fused power iterations"]
            report.add(f"{label}: plain / fused power iterations", ratio, "x")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
