"""The displaced output of a linear layer, by matrix products of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from zoext._reference import checks
from zoext._reference.rounding import arithmetic


def factored_linear_(out: Tensor, input: Tensor, left: Tensor, right: Tensor, coefficients: Tensor) -> None:
    """See ``zoext.ops.factored_linear_``. Orders of sums are those of the device's matrix products."""
    checks.factored_linear(out, input, left, right, coefficients)
    dtype = arithmetic(out.dtype)
    with torch.inference_mode():
        left, right = left.detach().to(dtype), right.detach().to(dtype)
        for to, rows, own in zip(out.detach(), input.detach(), coefficients.to(dtype), strict=True):
            change = _change(rows.to(dtype), left, right, own)
            to.copy_(torch.where((own != 0).any(), (to.to(dtype) + change).to(out.dtype), to))


def _change(rows: Tensor, left: Tensor, right: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_k coefficients[k] (rows right_k^T) left_k``.

    Terms with a coefficient of zero are skipped, also if their factors are not finite.
    """
    contributes = (coefficients != 0)[:, None, None]
    nothing = torch.zeros((), dtype=rows.dtype, device=rows.device)
    scaled = torch.where(contributes, coefficients[:, None, None] * left, nothing)
    if len(right) == 1:
        return (rows @ right[0].T) @ scaled.sum(0)
    products = torch.where(contributes, rows @ right.mT, nothing)
    return (products @ scaled).sum(0)
