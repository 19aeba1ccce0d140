"""The leading right singular vectors of activations, by the method of ``csrc/core/power_iteration.h``.

It finds the same subspace as the kernels, but the bits differ and vectors may have the opposite sign. The
small problem at the end is solved by one-sided Jacobi rotations in float32 (Demmel and Veselic, SIMAX 13,
1992), while the kernels compute eigenvectors of the Gram matrix in float64: few devices have an eigensolver
that does not synchronize with the host, and some have no float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoext._reference import checks
from zoext._reference.field import NoiseTerm, round_keys
from zoext._reference.places import CHUNK, Places
from zoext.ops import Distribution, Stream

_LARGEST = 1e36  # rows with a larger magnitude count as nonfinite
_SMALLEST_REMAINDER, _LEAST_KEPT = 1e-12, 0.25  # ratios of squared norms, as in the kernels
_SMALLEST_RATIO = 1e-12
_SWEEPS = 10  # Jacobi's method converges quadratically; 6 to 8 are enough for a thousand rows


def power_iteration(
    input: Tensor, mask: Tensor | None, seed: Tensor, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """See ``zoext.ops.power_iteration``."""
    features = checks.power_iteration(input, mask, seed, rank, iterations)
    with torch.no_grad():
        rows = _Rows(input.detach().reshape(-1, features), None if mask is None else mask.reshape(-1))
        enough = -(-min(rows.count, features) // rank)  # more blocks would exceed the dimension of the space
        blocks = min(iterations, enough) + 1
        basis, products = _krylov(rows, seed.reshape(1), rank, blocks)
        rotations = _orthogonal_rows(products)
        values, order = (rotations @ products).square().sum(1).sqrt().sort(descending=True, stable=True)
        counts = values.square() > _SMALLEST_RATIO * values[0].square()
        candidates = (rotations[order] @ basis)[:rank]
        values = torch.where(counts, values, 0.0)[:rank]
        vectors: list[Tensor] = []
        for q in range(rank):
            vector = _orthonormal(candidates[q], torch.stack(vectors) if vectors else None)
            vectors.append(torch.where(values[q] > 0, vector, 0.0))
        values = torch.where(rows.is_finite, values / rows.scale, float("nan"))
        return torch.where(rows.is_finite, torch.stack(vectors), 0.0), values


class _Rows:
    """The rows, scaled by a power of two so that no sum overflows; masked rows are zero."""

    def __init__(self, rows: Tensor, mask: Tensor | None) -> None:
        self._rows = rows
        self._mask = mask
        self.count, self.features = rows.shape
        self.scale = torch.ones((), dtype=torch.float32, device=rows.device)
        largest = torch.zeros((), dtype=torch.float32, device=rows.device)
        finite = torch.ones((), dtype=torch.bool, device=rows.device)
        for _, some in self.chunks():
            magnitude = some.abs()
            finite = finite & (magnitude <= _LARGEST).all()
            largest = torch.maximum(largest, torch.where(magnitude <= _LARGEST, magnitude, 0.0).max())
        self.is_finite = finite
        self.scale = _scale_to_one(largest)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The number of the first row of a chunk, and its rows."""
        size = max(CHUNK // self.features, 1)
        for begin in range(0, self.count, size):
            rows = self._rows[begin : begin + size].to(torch.float32)
            if self._mask is not None:
                rows = torch.where(self._mask[begin : begin + size].unsqueeze(1), rows, 0.0)
            yield begin, rows * self.scale


def _krylov(rows: _Rows, seed: Tensor, rank: int, blocks: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the Krylov space, one vector per row, and its products with the rows."""
    start = torch.zeros((rank, rows.features), dtype=torch.float32, device=seed.device)
    term = NoiseTerm(round_keys(seed)[0], 0, Distribution.NORMAL, Stream.POWER_ITERATION)
    for begin, some in rows.chunks():
        places = Places(begin * rank, len(some) * rank, (0, max(rows.count * rank, 1), 0), seed.device)
        start += term.at(places, torch.float32).reshape(len(some), rank).T @ some
    basis: list[Tensor] = []
    products: list[Tensor] = []
    block = start
    for _ in range(blocks):
        done = len(basis)
        for vector in block:
            basis.append(_orthonormal(vector, torch.stack(basis) if basis else None))
        newest = torch.stack(basis[done:])
        block = torch.zeros_like(start)
        parts = [newest[:, :0]]
        for _, some in rows.chunks():
            parts.append(newest @ some.T)
            block += parts[-1] @ some
        products.append(torch.cat(parts[1:] or [newest[:, :0]], dim=1))
    return torch.stack(basis), torch.cat(products)


def _orthonormal(vector: Tensor, basis: Tensor | None) -> Tensor:
    """``vector`` made orthonormal to the rows of ``basis``, or zero if it depends on them linearly."""
    vector = vector * _scale_to_one(vector.abs().max())
    before = once = twice = vector.square().sum()
    for _ in range(2 if basis is not None else 0):
        assert basis is not None
        vector = vector - (basis @ vector) @ basis
        once, twice = twice, vector.square().sum()
    is_lost = (twice <= _SMALLEST_REMAINDER * before) | (twice < _LEAST_KEPT * once)
    return torch.where(is_lost, 0.0, vector / twice.sqrt())


def _orthogonal_rows(rows: Tensor) -> Tensor:
    """A matrix of rotations that makes ``rows`` orthogonal to each other: their left singular vectors."""
    count = len(rows)
    rotations = torch.eye(count, dtype=torch.float32, device=rows.device)
    both = torch.cat((rows, rotations), dim=1)
    if count % 2:
        both = torch.cat((both, torch.zeros_like(both[:1])))
    half = len(both) // 2
    if count > 1:
        # All pairs, in rounds of disjoint pairs, as in a round-robin tournament.
        upper, lower = both[:half], both[half:]
        for _ in range(_SWEEPS * (2 * half - 1)):
            upper, lower = _rotated(upper, lower, rows.shape[1])
            upper, lower = (
                torch.cat((upper[:1], lower[:1], upper[1:-1])) if half > 1 else upper,
                torch.cat((lower[1:], upper[-1:])) if half > 1 else lower,
            )
        both = torch.cat((upper, lower))
    rotations = both[:, rows.shape[1] :]
    # Renormalized after hundreds of roundings; the clamp is for the zero row that pads an odd count.
    return rotations / rotations.square().sum(1, keepdim=True).sqrt().clamp(min=0.5)


def _rotated(a: Tensor, b: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pairs of rows, rotated so that their first ``length`` elements are orthogonal."""
    left, right = a[:, :length], b[:, :length]
    alpha, beta, gamma = (left * left).sum(1), (right * right).sum(1), (left * right).sum(1)
    is_orthogonal = gamma.abs() <= 1e-9 * (alpha * beta).sqrt()
    zeta = (beta - alpha) / (2.0 * torch.where(is_orthogonal, 1.0, gamma))
    sign = torch.where(zeta < 0, -1.0, 1.0)
    tangent = sign / (zeta.abs() + (1.0 + zeta * zeta).sqrt())
    tangent = torch.where(is_orthogonal, 0.0, tangent)
    cosine = (1.0 + tangent * tangent).rsqrt().unsqueeze(1)
    sine = cosine * tangent.unsqueeze(1)
    return cosine * a - sine * b, sine * a + cosine * b


def _scale_to_one(magnitude: Tensor) -> Tensor:
    """The power of two that scales a magnitude to 1 .. 2, or the nearest one in range."""
    exponent = (magnitude.view(torch.int32) >> 23) & 0xFF
    return ((254 - exponent).clamp(min=1, max=253) * 2**23).view(torch.float32)
