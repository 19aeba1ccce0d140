"""An update of AdaMeZO over the parameters of OPT-125M, against plain torch and the limit of arithmetic.

    python benchmarks/adam_update.py --threads 2 --json adam_update.json

The moments of the last ten estimates are made anew from their seeds in every update.
"""

from __future__ import annotations

import torch

from zoext import ops
from zoext._benchmarking import arguments as options
from zoext._benchmarking.dense_pass import DensePass, Shape
from zoext._benchmarking.report import Report, at_least
from zoext._benchmarking.timing import interleaved, threads

HORIZON = 10
BETAS = (0.7, 0.9)
LR, EPS = 1e-5, 1e-8


class AdamUpdate:
    """Parameters of ``shapes``, a full window of estimates, and the ways to take a step.

    Args:
        shapes: one per parameter.
        dtype: float32, float64, bfloat16 or float16.
        device: where the parameters are.
    """

    def __init__(self, shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> None:
        self.work = DensePass(shapes, dtype, device)
        self.parameters = self.work.parameters
        self.seeds = list(range(HORIZON))
        self.coefficients = [0.5 + 0.1 * step for step in range(HORIZON)]
        lags = range(HORIZON - 1, -1, -1)
        self.first_weights, self.second_weights = ([(1 - b) * b**lag for lag in lags] for b in BETAS)
        self._device = device
        self._window = self._window_on(device)

    def plain(self) -> None:
        """The published algorithm in torch, as lean as it gets: no temporary but one tensor's noise, mean
        and square, each written in place; every stream is a generator that goes on from tensor to tensor.
        """
        streams = [torch.Generator(self._device).manual_seed(seed) for seed in self.seeds]
        window = list(zip(streams, self.coefficients, self.first_weights, self.second_weights, strict=True))
        for parameter in self.parameters:
            noise = torch.empty_like(parameter)
            mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
            for stream, coefficient, first, second in window:
                noise.normal_(generator=stream)
                mean.add_(noise, alpha=first * coefficient)
                square.addcmul_(noise, noise, value=second * coefficient**2)
            parameter.addcdiv_(mean, square.add_(EPS).sqrt_(), value=-LR)

    def noise_only(self) -> None:
        """As many normals, into memory that stays in a cache: the limit that arithmetic sets."""
        for _ in range(HORIZON):
            self.work.noise_only()

    def fused(self) -> None:
        """The operator of this package."""
        spans = [ops.span_of(parameter) for parameter in self.parameters]
        ops.noise_window_(self.parameters, *self._window, range(len(self.parameters)), spans)

    def _window_on(self, device: torch.device) -> list[torch.Tensor]:
        """What the operator takes between the parameters and their keys."""
        steps = [torch.tensor(numbers).reshape(HORIZON, 1) for numbers in (self.seeds, self.coefficients)]
        weights = [torch.tensor(weights) for weights in (self.first_weights, self.second_weights)]
        rates = [torch.tensor(rate) for rate in (LR, EPS, 0.0)]
        return [tensor.to(device) for tensor in (*steps, *weights, *rates)]


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=5)
    options.add_model_arguments(parser)
    arguments = parser.parse_args()
    shapes = options.shapes_of(arguments)
    title = f"AdaMeZO's update, window {HORIZON}, over {options.describe(shapes)}"
    report = Report(title, options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in (torch.float32, torch.bfloat16):
            update = AdamUpdate(shapes, dtype, arguments.device)
            cases = {
                "plain update": update.plain,
                "noise only": update.noise_only,
                "fused update": update.fused,
            }
            times = interleaved(cases, repeats=arguments.repeats, device=arguments.device)
            label = str(dtype).removeprefix("torch.")
            target = at_least(10) if arguments.device.type == "cpu" else None
            report.add_times(label, times)
            ratio = times["plain update"] / times["fused update"]
            report.add(f"{label}: plain update / fused update", ratio, "x", target)
            report.add(
                f"{label}: fused update / noise only", times["fused update"] / times["noise only"], "x"
            )
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
