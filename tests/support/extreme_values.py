"""Weights of every kind, for comparisons to the bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def extreme_values(dtype: torch.dtype) -> Tensor:
    """Zeros, the borders of the subnormal, normal and infinite numbers, and NaN, of both signs."""
    info = torch.finfo(dtype)
    positive = [0.0, info.tiny, info.tiny / 2, 1.0, info.max, info.max / 2, float("inf"), float("nan"), 3.0]
    smallest = 2.0 ** int(np.log2(info.tiny) + np.log2(info.eps)) if dtype != torch.float64 else 5e-324
    positive += [smallest, 3 * smallest, info.tiny - smallest, 1 + info.eps, info.eps, info.eps / 2]
    return torch.tensor([*positive, *(-value for value in positive)], dtype=torch.float64).to(dtype)


def weights(dtype: torch.dtype) -> Tensor:
    """Ordinary weights of many sizes, then the extreme values several times over; an odd number."""
    generator = torch.Generator().manual_seed(4)
    ordinary = torch.randn(101, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-6, 1, 101, dtype=torch.float64)
    return torch.cat([(ordinary * scales).to(dtype), *[extreme_values(dtype)] * 3])


def with_payloads(theta: Tensor) -> Tensor:
    """Those weights and nine NaNs of different patterns, all of them quiet."""
    payloads = torch.full((9,), float("nan"), dtype=theta.dtype)
    patterns = payloads.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[payloads.element_size()])
    patterns.add_(torch.arange(9).to(patterns.dtype))
    return torch.cat([theta, payloads])
