"""Rounding to 16 bits on CUDA gives the CPU's bits for numbers of every kind.

The kernels round pairs of ordinary numbers with a few instructions and look for the others, which end where a
number rounds beyond the largest one. A matrix of one row, moved by a product with one, is rounded as it is.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.cuda_comparison import MARKS, assert_same_move
from zoext import ops
from zoext.ops import Rounding

pytestmark = MARKS

DTYPES = (torch.bfloat16, torch.float16)
#: Patterns of floats where rules change: where float16 ends, is subnormal, and vanishes; where bfloat16 ends.
EDGES = (0x477FE000, 0x477FEFF0, 0x477FF000, 0x38800000, 0x33800000, 0x33000000, 0x7F7F0000, 0x7F7F7F80)
EDGES += (0x7F7F8000, 0x7F800000, 0x00800000, 0x3F800000, 0)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_rounding = pytest.mark.parametrize("rounding", Rounding)


def patterns(count: int) -> Tensor:
    """Floats of every exponent, and those around the edges, of both signs."""
    generator = torch.Generator().manual_seed(1)
    anything = torch.randint(0, 2**31, (count,), generator=generator)
    edges = (torch.tensor(EDGES)[:, None] + torch.arange(-40, 41)).clamp(0, 2**31 - 1).flatten()
    ties = torch.randint(0, 2**18, (count,), generator=generator) * 2**13
    magnitudes = torch.cat([anything, edges, ties])
    return torch.cat([magnitudes, magnitudes - 2**31]).to(torch.int32).view(torch.float32)


def assert_same_sum(theta: Tensor, change: Tensor, rounding: Rounding) -> None:
    """``theta + change``, rounded."""
    factors = [torch.ones(1, 1, 1)], [change.view(1, 1, -1)]
    term = torch.tensor([77]), torch.ones(1), torch.tensor(0.0)
    place = ([3], [(2**34 + 8, len(theta), 0)])
    assert_same_move(ops.factored_axpy_, theta, (*factors, *term), place, rounding=rounding)


@every_rounding
@every_dtype
def test_every_kind_of_float(dtype: torch.dtype, rounding: Rounding) -> None:
    change = patterns(20_000)
    assert_same_sum(torch.zeros(len(change), dtype=dtype), change, rounding)


@every_dtype
def test_weights_that_were_set_to_zero(dtype: torch.dtype) -> None:
    """Their residuals may be anything."""
    theta = torch.tensor([0.0, -0.0], dtype=dtype).repeat(256)
    residual = torch.arange(-128, 128, dtype=torch.int8).repeat_interleave(2)
    term = torch.tensor([5]), torch.tensor([torch.finfo(dtype).smallest_normal / 2**6]), torch.tensor(0.125)
    moved = [(theta.clone(), residual.clone()), (theta.cuda(), residual.cuda())]
    for weights, rest in moved:
        given = [tensor.to(weights.device) for tensor in term]
        place = ([2], [(8, 512, 0)])
        ops.noise_axpy_([weights], *given, *place, rounding=Rounding.RESIDUAL, residuals=[rest])
    for cpu, gpu in zip(*moved, strict=True):
        assert cpu.isfinite().all()
        assert cpu.equal(gpu.cpu())


@every_rounding
@every_dtype
def test_every_weight(dtype: torch.dtype, rounding: Rounding) -> None:
    """All 65,536 patterns, with residuals for those that have one, that stay and that move a little."""
    theta = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(2)
    little = torch.randn(len(theta), generator=generator) * theta.float().abs().clamp(1e-9, 1e37) * 2**-9
    for change in (torch.full((len(theta),), -0.0), little.nan_to_num()):
        assert_same_sum(theta, change, rounding)
