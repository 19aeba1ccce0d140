"""What the tests of bit-identity compare with tells numbers apart that are equal, and NaN from nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.graphed_runs import same

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors(dtype: torch.dtype) -> None:
    zero, nan = torch.zeros(3, dtype=dtype), torch.full((2, 2), float("nan"), dtype=dtype)
    assert same(zero, zero.clone())
    assert not same(zero, -zero)
    assert same(nan, nan.clone())
    assert not same(zero, zero.double() if dtype != torch.float64 else zero.float())
    assert not same(zero, zero[:2])
    assert same(nan.t(), nan)


@pytest.mark.parametrize(("a", "b"), [(0.0, -0.0), ([0.0], [-0.0]), ({"lr": 1.0}, {"lr": 2.0}), (1, 2)])
def test_plain_data(a: Any, b: Any) -> None:
    assert same(a, a)
    assert not same(a, b)
    assert same([float("nan")], [float("nan")])
    assert not same(torch.zeros(1), [0.0])
