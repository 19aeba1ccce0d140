"""The factored displacements of all linear layers of OPT-125M in two copies of a batch, against the layers.

python benchmarks/factored_linear.py --threads 2 --json factored_linear.json
"""

from __future__ import annotations

import argparse

import torch
from opt_model import BATCH, TOKENS
from torch import Tensor
from torch.nn.functional import linear

from zoext import noise, ops
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report, at_most
from zoext._benchmarking.timing import Measurement, interleaved, threads

RANK, COPIES, SCALE = 2, 2, 1e-3
#: Of the time of the layers, in percent.
MOST = {torch.float32: 4.0, torch.bfloat16: 8.0}


class FactoredLinears:
    """The linear layers of a decoder, and what displaces them in each copy of a batch.

    Args:
        layers, width: the decoder's size. In a layer, four linear layers map ``width`` features to as many
            outputs, one maps them to four times as many and one maps these back.
        dtype: float32, float64, bfloat16 or float16.
        device: where everything is.
    """

    def __init__(self, layers: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shapes = [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * layers
        self.weights = [
            noise.normal(shape, seed=1, key=key, dtype=dtype, device=device).mul_(0.02)
            for key, shape in enumerate(shapes)
        ]
        self._left, self._right = (
            [
                noise.normal((1, RANK, shape[side]), seed=2 + side, key=key, device=device)
                for key, shape in enumerate(shapes)
            ]
            for side in (0, 1)
        )
        rows = COPIES, BATCH * TOKENS
        self._input, self.out = (
            {
                length: noise.normal((*rows, length), seed=seed, dtype=dtype, device=device)
                for length in {width, 4 * width}
            }
            for seed in (4, 5)
        )
        self._coefficients = torch.tensor([[SCALE], [-SCALE]], device=device)

    def linears(self) -> list[Tensor]:
        """The layers, over all copies at once."""
        return [linear(self._input[weight.shape[1]], weight) for weight in self.weights]

    def displacements(self) -> None:
        """What two opposite displacements add to the outputs: the operator of this package."""
        for weight, left, right in zip(self.weights, self._left, self._right, strict=True):
            outputs, features = weight.shape
            ops.factored_linear_(self.out[outputs], self._input[features], left, right, self._coefficients)

    def plain_displacements(self) -> None:
        """The same from matrix products of torch, which round in the dtype of the activations."""
        for weight, left, right in zip(self.weights, self._left, self._right, strict=True):
            outputs, features = weight.shape
            rows = self._input[features]
            products = (rows @ right[0].T.to(rows.dtype)) * self._coefficients.to(rows.dtype)[:, :, None]
            self.out[outputs].add_(products @ left[0].to(rows.dtype))


def measure(dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Measurement]:
    work = FactoredLinears(arguments.layers, arguments.width, dtype, arguments.device)
    cases = {
        "linear layers": torch.no_grad()(work.linears),
        "plain displacements": torch.no_grad()(work.plain_displacements),
        "fused displacements": work.displacements,
    }
    return interleaved(cases, repeats=arguments.repeats, device=arguments.device)


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=9)
    options.add_model_arguments(parser)
    arguments = parser.parse_args()
    title = (
        f"Displacements of rank {RANK} of the linear layers of {arguments.layers} decoder layers of width "
        f"{arguments.width}, {COPIES} copies of a batch of {BATCH} x {TOKENS}"
    )
    report = Report(title, options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in (torch.float32, torch.bfloat16):
            times = measure(dtype, arguments)
            label = str(dtype).removeprefix("torch.")
            report.add_times(label, times)
            share = times["fused displacements"] / times["linear layers"]
            report.add(
                f"{label}: displacements, of the layers' time",
                Measurement(tuple(100 * s for s in share.rounds)),
                "%",
                at_most(MOST[dtype]) if arguments.device.type == "cpu" else None,
            )
            ratio = times["plain displacements"] / times["fused displacements"]
            report.add(f"{label}: plain / fused displacements", ratio, "x")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
