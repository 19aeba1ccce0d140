"""``power_iteration`` behaves as torch's own operators, and refuses bad arguments by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from support import oracle
from zoext import ops

SEED = torch.tensor([5])


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(1)).to(dtype)


def ones() -> Tensor:
    return torch.ones(2, 9, dtype=torch.bool)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, masked: bool) -> None:
    arguments = (rows(dtype), ones() if masked else None, SEED, 3, 2)
    report = torch.library.opcheck(torch.ops.zoext.power_iteration.default, arguments)
    assert set(report.values()) == {"SUCCESS"}


def test_fake_tensors() -> None:
    with FakeTensorMode():
        seed = torch.tensor([5])
        basis, values = ops.power_iteration(rows(torch.bfloat16), ones(), seed, rank=3, iterations=2)
    assert isinstance(basis, FakeTensor)
    assert isinstance(values, FakeTensor)
    assert basis.shape == (3, 7)
    assert values.shape == (3,)
    assert basis.dtype == values.dtype == torch.float32


def test_compiled_once_for_every_seed() -> None:
    def step(activations: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        basis, values = ops.power_iteration(activations * 1, None, seed, rank=2, iterations=2)
        return basis + 0, values + 0

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(3):
        for found, expected in zip(compiled(rows(), SEED + seed), step(rows(), SEED + seed), strict=True):
            oracle.assert_same_bits(found, expected)
    assert counter.frame_count == 1


def test_inference_mode_and_inputs_that_require_grad() -> None:
    expected = ops.power_iteration(rows(), None, SEED, rank=2, iterations=2)
    with torch.inference_mode():
        inference = ops.power_iteration(rows(), None, SEED, rank=2, iterations=2)
    with torch.no_grad():
        leaf = ops.power_iteration(rows().requires_grad_(), None, SEED, rank=2, iterations=2)
    for i, found, want in zip(inference, leaf, expected, strict=True):
        oracle.assert_same_bits(i.clone(), want)
        oracle.assert_same_bits(found, want)


GOOD: dict[str, Any] = {"input": rows(), "mask": ones(), "seed": SEED, "rank": 3, "iterations": 2}
BAD = [
    ({"rank": 0}, "rank must be in 1 .. 7, the number of features of input, not 0"),
    ({"rank": -2}, "rank must be in 1 .. 7, .* not -2"),
    ({"rank": 8}, "rank must be in 1 .. 7, the number of features of input, not 8"),
    ({"iterations": -1}, "iterations must be at least 0, not -1"),
    ({"input": rows().int()}, "input must be float32, float64, bfloat16 or float16"),
    ({"input": rows().to(torch.complex64)}, "input must be float32"),
    ({"input": rows().transpose(0, 1)}, r"input is not contiguous; pass input.contiguous\(\)"),
    ({"input": torch.tensor(1.0), "mask": None}, "input must have a last dimension of at least one feature"),
    ({"input": torch.ones(4, 0), "mask": None}, "input must have a last dimension of at least one feature"),
    ({"mask": ones().float()}, "mask must be a contiguous bool tensor"),
    ({"mask": ones().t().contiguous().t()}, "mask must be a contiguous bool tensor"),
    ({"mask": ones()[0]}, "mask must have the shape of input without its last dimension: 18 elements, not 9"),
    ({"mask": ones().reshape(9, 2)}, "mask must have the shape of input without its last dimension"),
    ({"mask": ones().reshape(18)}, "mask must have the shape of input"),
    ({"seed": torch.tensor([1, 2])}, "seed must hold one int64 number"),
    ({"seed": torch.tensor([1.0])}, "seed must hold one int64 number"),
    ({"seed": 3}, "'seed'"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_arguments_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.power_iteration(**{**GOOD, **bad})


def test_good_arguments_are_good() -> None:
    basis, values = ops.power_iteration(**GOOD)
    assert (values > 0).all()
    assert (basis.norm(dim=1) > 0.99).all()
