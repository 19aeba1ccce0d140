"""The operators on activations: the subspace they span, and the displaced output of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from zoext.ops import _library as _library  # the operators are registered before they are called
from zoext.ops._arguments import written


def factored_linear_(out: Tensor, input: Tensor, left: Tensor, right: Tensor, coefficients: Tensor) -> None:
    """``out[c] += sum_k coefficients[c, k] (input[c] right_k^T) left_k``: a linear layer's displacement.

    It is what ``theta + sum_k coefficients[c, k] left_k^T right_k`` adds to the output of a layer with the
    weight theta, without a displaced weight.

    Args:
        out: [C, T, m], contiguous, of any floating-point dtype: T rows of outputs for each of C copies. It
            shares no memory with the other arguments.
        input: [C, T, n], contiguous, of the dtype of ``out``.
        left: float32 [K or 1, r, m], contiguous, with r at least 1; a factor with one entry serves all terms.
        right: float32 [K or 1, r, n], contiguous. If it has one entry, ``input[c] right^T`` is computed once
            for all terms.
        coefficients: float32 [C, K]. A coefficient of zero leaves its term out; a copy whose coefficients are
            all zero is left as it is.

    Sums are float32, or float64 for float64, and are rounded once when they are added to ``out``. No bit of a
    row depends on the other rows, on the other copies or on the device.

    Example:
        >>> input, out = torch.ones(2, 4, 3), torch.zeros(2, 4, 5)
        >>> left, right = torch.ones(1, 1, 5), torch.ones(1, 1, 3)
        >>> factored_linear_(out, input, left, right, torch.tensor([[0.5], [-0.5]]))
        >>> out[:, 0, 0].tolist()
        [1.5, -1.5]
    """
    torch.ops.zoext.factored_linear_(out, input, left, right, coefficients)
    written([out])


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
