"""Passes of directions L^T R over the matrices of OPT-125M, against plain torch and the limit of memory.

    python benchmarks/factored_pass.py --threads 2 --json factored_pass.json

A pass of one term of rank 1, as AGZO makes (arXiv 2601.17261), one of rank 2, as LOZO makes
(arXiv 2410.07698), and an Adam step of ten estimates of rank 2.
"""

from __future__ import annotations

from functools import partial

import torch

from zoext import ops
from zoext._benchmarking import arguments as options
from zoext._benchmarking.dense_pass import DensePass, Shape
from zoext._benchmarking.report import Report, at_most
from zoext._benchmarking.timing import Measurement, interleaved, threads

HORIZON = 10
SCALE = 1e-6
LR, EPS = 1e-5, 1e-8


class FactoredPass:
    """Matrices of ``shapes``, factors of ``HORIZON`` terms, and the ways to go over all of them once.

    Args:
        shapes: one per matrix.
        dtype: float32, float64, bfloat16 or float16.
        device: where the matrices are.
    """

    def __init__(self, shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> None:
        self.work = DensePass(shapes, dtype, device)
        self.matrices = self.work.parameters
        self._left, self._right = (
            [torch.randn(HORIZON, 2, shape[side], device=device) for shape in shapes] for side in (0, 1)
        )
        self._places = range(len(shapes)), [ops.span_of(matrix) for matrix in self.matrices]
        self._seeds = torch.arange(HORIZON, device=device)
        self._weights = torch.full((HORIZON,), 0.1, device=device)
        self._coefficients = torch.ones(HORIZON, 1, device=device)
        self._scale = torch.tensor([SCALE], device=device)
        self._lr, self._eps, self._decay = (torch.tensor(number, device=device) for number in (LR, EPS, 0.0))

    def plain(self, rank: int) -> None:
        """One product into each matrix: no temporary."""
        for matrix, left, right in zip(self.matrices, self._left, self._right, strict=True):
            one = left[0, :rank].T.to(matrix.dtype), right[0, :rank].to(matrix.dtype)
            matrix.addmm_(*one, alpha=SCALE)

    def fused(self, rank: int) -> None:
        """The operator of this package."""
        term = self._seeds[:1], self._scale, self._decay
        ops.factored_axpy_(self.matrices, *self._first_factors(rank), *term, *self._places)

    def fused_copy(self, out: list[torch.Tensor], rank: int) -> None:
        """As ``fused``, into ``out``, which has the shapes of the matrices."""
        term = self._seeds[:1], self._scale
        ops.factored_copy_(out, self.matrices, *self._first_factors(rank), *term, *self._places)

    def plain_adam(self) -> None:
        """As lean as it gets: no temporary but one matrix's direction, mean and square."""
        for matrix, left, right in zip(self.matrices, self._left, self._right, strict=True):
            direction = torch.empty_like(matrix)
            mean, square = torch.zeros_like(matrix), torch.zeros_like(matrix)
            for columns, rows in zip(left.to(matrix.dtype), right.to(matrix.dtype), strict=True):
                torch.mm(columns.T, rows, out=direction)
                mean.add_(direction, alpha=0.1)
                square.addcmul_(direction, direction, value=0.1)
            matrix.addcdiv_(mean, square.add_(EPS).sqrt_(), value=-LR)

    def fused_adam(self) -> None:
        """The operator of this package."""
        steps = self._seeds[:, None], self._coefficients, self._weights, self._weights
        rates = self._lr, self._eps, self._decay
        ops.factored_window_(self.matrices, self._left, self._right, *steps, *rates, *self._places)

    def _first_factors(self, rank: int) -> list[list[torch.Tensor]]:
        return [[factor[:1, :rank] for factor in side] for side in (self._left, self._right)]


def add_figures(report: Report, label: str, times: dict[str, Measurement]) -> None:
    report.add_times(label, times)
    for rank, target in ((1, at_most(2)), (2, None)):
        fused, product = times[f"fused pass, rank {rank}"], times[f"plain product, rank {rank}"]
        report.add(f"{label}: fused pass / plain pass, rank {rank}", fused / times["plain pass"], "x", target)
        report.add(f"{label}: plain product / fused pass, rank {rank}", product / fused, "x")
    ratio = times["plain Adam step"] / times["fused Adam step"]
    report.add(f"{label}: plain / fused Adam step", ratio, "x")


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=9)
    options.add_model_arguments(parser)
    arguments = parser.parse_args()
    shapes = [shape for shape in options.shapes_of(arguments) if len(shape) == 2]
    report = Report(f"L^T R over {options.describe(shapes)}", options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in (torch.float32, torch.bfloat16):
            work = FactoredPass(shapes, dtype, arguments.device)
            cases = {
                "plain pass": work.work.plain,
                "plain product, rank 1": partial(work.plain, 1),
                "plain product, rank 2": partial(work.plain, 2),
                "plain Adam step": work.plain_adam,
                "fused pass, rank 1": partial(work.fused, 1),
                "fused pass, rank 2": partial(work.fused, 2),
                "fused Adam step": work.fused_adam,
            }
            times = interleaved(cases, repeats=arguments.repeats, device=arguments.device)
            label = str(dtype).removeprefix("torch.")
            add_figures(report, label, times)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
