"""One pass ``theta += c z`` over all parameters, in several implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch

from zoext import noise, ops
from zoext._benchmarking.report import Report, at_least
from zoext._benchmarking.timing import Measurement

Shape = tuple[int, ...]

SEED = 1
SCALE = 1e-3
MOST_TERMS = 4
STEPS = 16


def opt_shapes(
    *, layers: int = 12, width: int = 768, vocabulary: int = 50272, positions: int = 2050
) -> list[Shape]:
    """The parameter shapes of an OPT decoder (arXiv 2205.01068) with tied embeddings.

    The defaults are OPT-125M: 125.24 million parameters in 196 tensors.
    """
    square, hidden = (width, width), 4 * width
    attention: list[Shape] = [square, (width,)] * 4
    norms: list[Shape] = [(width,)] * 4
    feed_forward: list[Shape] = [(hidden, width), (hidden,), (width, hidden), (width,)]
    ends: list[Shape] = [(vocabulary, width), (positions, width), (width,), (width,)]
    return ends + layers * (attention + norms + feed_forward)


class DensePass:
    """Parameters of ``shapes``, and several ways to pass over all of them once.

    Args:
        shapes: one per parameter.
        dtype: float32, float64, bfloat16 or float16.
        device: of the parameters.
    """

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
        self.parameters = [
            noise.normal(shape, seed=SEED, key=key, dtype=dtype, device=device).mul_(0.02)
            for key, shape in enumerate(shapes)
        ]
        self.elements = sum(parameter.numel() for parameter in self.parameters)
        self._keys = range(len(shapes))
        self._spans = [ops.span_of(parameter) for parameter in self.parameters]
        self._seeds = torch.arange(SEED, SEED + MOST_TERMS, device=device)
        self._coefficients = torch.full((MOST_TERMS,), SCALE, device=device)
        self._decay = torch.zeros((), device=device)
        size = self.elements * dtype.itemsize
        self._bytes = torch.zeros(-(-size // 4), dtype=torch.int32, device=device)
        self._pieces = self._reused_pieces(dtype, device)

    def baseline(self) -> None:
        """Perturbs with the standard PyTorch loop of MeZO's script (arXiv 2305.17333) and its forks."""
        baseline_perturb(self.parameters, SEED, 1.0, SCALE)

    def plain(self) -> None:
        """Reads and writes the same number of bytes in one tensor: the limit set by memory bandwidth.

        The tensor holds integers, because 16-bit sums in torch are compute-bound.
        """
        self._bytes.bitwise_not_()

    def copy(self) -> None:
        """Reads and writes the same number of bytes with device copies between two halves."""
        half = len(self._bytes) // 2
        first, second = self._bytes[:half], self._bytes[len(self._bytes) - half :]
        second.copy_(first)
        first.copy_(second)

    def noise_only(self) -> None:
        """Generates the same number of normals into cache-resident buffers: the limit set by arithmetic."""
        spans = [ops.span_of(piece) for piece in self._pieces]
        ops.normal_(self._pieces, self._seeds[:1], range(len(self._pieces)), spans)

    def fused(
        self,
        distribution: ops.Distribution = ops.Distribution.NORMAL,
        rounding: ops.Rounding = ops.Rounding.NEAREST,
        terms: int = 1,
    ) -> None:
        """This package's operator, with 1 to 4 terms ``c z``."""
        ops.noise_axpy_(
            self.parameters,
            self._seeds[:terms],
            self._coefficients[:terms],
            self._decay,
            self._keys,
            self._spans,
            distribution=distribution,
            rounding=rounding,
            residuals=self._residuals if rounding == ops.Rounding.RESIDUAL else (),
        )

    def steps_at_once(self) -> None:
        """16 one-term steps in one call."""
        device = self._seeds.device
        seeds = torch.arange(SEED, SEED + STEPS, device=device)[:, None]
        coefficients, decay = torch.full((STEPS, 1), SCALE, device=device), torch.zeros(STEPS, device=device)
        ops.noise_axpy_(self.parameters, seeds, coefficients, decay, self._keys, self._spans)

    def steps_one_by_one(self) -> None:
        """The same steps, one call each."""
        for _ in range(STEPS):
            self.fused()

    @cached_property
    def _residuals(self) -> list[torch.Tensor]:
        return [
            torch.zeros(
                parameter.shape if parameter.itemsize == 2 else 0, dtype=torch.int8, device=parameter.device
            )
            for parameter in self.parameters
        ]

    def _reused_pieces(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """A list with as many elements as the parameters that repeats a few cache-sized buffers.

        On a CPU there is one buffer per thread, because threads take contiguous parts of the list and would
        otherwise contend for the same cache lines.
        """
        on_cpu = device.type == "cpu"
        size = min(self.elements, 2**18 if on_cpu else 2**22)
        buffers = [
            torch.empty(size, dtype=dtype, device=device)
            for _ in range(torch.get_num_threads() if on_cpu else 1)
        ]
        count = -(-self.elements // size)
        return [buffers[i * len(buffers) // count] for i in range(count)]

    def rivals(self) -> dict[str, Callable[[], None]]:
        """The implementations that every report on this pass compares."""
        return {
            "baseline": self.baseline,
            "plain pass": self.plain,
            "noise only": self.noise_only,
            "fused pass": self.fused,
        }


def add_rivals(report: Report, label: str, times: Mapping[str, Measurement], device: torch.device) -> None:
    """Adds the times, which include those of ``DensePass.rivals``, and their ratios."""
    report.add_times(label, times)
    limit = times["plain pass"].larger_of(times["noise only"])
    target = at_least(12) if device.type == "cpu" else None
    report.add(f"{label}: baseline / fused pass", times["baseline"] / times["fused pass"], "x", target)
    report.add(f"{label}: fused pass / larger limit", times["fused pass"] / limit, "x")


def baseline_perturb(parameters: Sequence[torch.Tensor], seed: int, factor: float, scale: float) -> None:
    """``theta += factor * z * scale`` as other implementations write it, one parameter at a time.

    Every product and the sum allocates a tensor, and on a CPU torch draws normals on one thread.
    """
    torch.manual_seed(seed)
    for parameter in parameters:
        z = torch.normal(
            mean=0.0, std=1.0, size=parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        parameter.data = parameter.data + factor * z * scale
