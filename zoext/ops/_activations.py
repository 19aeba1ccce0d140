"""The operators on activations: the subspace they span."""

from __future__ import annotations

import torch
from torch import Tensor

from zoext.ops import _library as _library  # the operators are registered before they are called


def power_iteration(
    input: Tensor, mask: Tensor | None, seed: Tensor, *, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the leading ``rank`` right singular vectors of the rows of ``input``.

    Args:
        input: [..., d], contiguous, of any floating-point dtype; the arithmetic is float32.
        mask: bool [...], which rows count; None counts all. The others may hold anything.
        seed: int64, one element; the start is drawn from the noise field, with key 0 whatever the layer.
        rank: how many vectors, 1 to d.
        iterations: how many products with the Gram matrix, 0 or more.

    Returns:
        The basis, float32 [rank, d], one vector a row, and the singular values, float32 [rank], in
        descending order. Vectors beyond the rank of the input are zero, and so are their values; without
        rows that count, all are. The rank is that of float32: values below 1e-6 of the largest are lost
        in its rounding. If a row that counts is not finite, also once it is float32, or exceeds 1e36,
        the basis is zero and the values are NaN.

    The method is a block Krylov iteration with Rayleigh-Ritz (Musco and Musco, NeurIPS 2015, algorithm 2)
    on ``H^T H`` for the rows ``H``: it takes as many products with ``H`` as power iteration and is far
    more accurate.
    """
    basis, values = torch.ops.zoext.power_iteration(input, mask, seed, rank, iterations)
    return basis, values


def _fake_power_iteration(
    input: Tensor, mask: Tensor | None, seed: Tensor, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    basis = input.new_empty((rank, input.shape[-1]), dtype=torch.float32)
    return basis, input.new_empty((rank,), dtype=torch.float32)


torch.library.register_fake("zoext::power_iteration", _fake_power_iteration)
