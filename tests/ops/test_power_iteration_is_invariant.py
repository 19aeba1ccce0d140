"""The bits of ``power_iteration`` depend on its arguments, and on nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import oracle
from zoext import _C, ops

# (tokens, features, rank, iterations): less than a vector of lanes, not a multiple of one, several chunks.
CASES = ((1, 1, 1, 0), (3, 5, 2, 3), (64, 32, 1, 3), (65, 37, 4, 2), (200, 77, 3, 3), (131, 515, 16, 3))


def activations(tokens: int, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + features)
    rows = torch.randn(tokens, features, generator=generator)
    rows[:, 0] *= 300
    return rows.to(dtype)


def run(case: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 7) -> tuple:
    tokens, features, rank, iterations = case
    mask = torch.arange(tokens) % 5 != 3
    return ops.power_iteration(
        activations(tokens, features, dtype), mask, torch.tensor([seed]), rank=rank, iterations=iterations
    )


def assert_same(found: tuple, expected: tuple) -> None:
    for f, e, what in zip(found, expected, ("basis", "values"), strict=True):
        oracle.assert_same_bits(f, e, what)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_instruction_sets(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    before = _C.instruction_set()
    try:
        _C.use_instruction_set("scalar")
        expected = run(case, dtype)
        for name in _C.available_instruction_sets():
            _C.use_instruction_set(name)
            assert_same(run(case, dtype), expected)
    finally:
        _C.use_instruction_set(before)


@pytest.mark.parametrize("case", [*CASES, (1500, 300, 2, 3), (700, 96, 20, 3)])
def test_threads(case: tuple[int, int, int, int], set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    expected = run(case)
    for threads in (2, 3, 7):
        set_threads(threads)
        assert_same(run(case), expected)


def test_subnormals_are_not_flushed() -> None:
    """Whatever the program has set for its own arithmetic."""
    rows = activations(100, 33) * 1e-38
    expected = ops.power_iteration(rows, None, torch.tensor([1]), rank=2, iterations=2)
    assert torch.set_flush_denormal(True)
    try:
        found = ops.power_iteration(rows, None, torch.tensor([1]), rank=2, iterations=2)
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, expected)


def test_the_seed_decides() -> None:
    case = (200, 77, 3, 1)
    assert_same(run(case, seed=-(2**63)), run(case, seed=-(2**63)))
    assert not torch.equal(run(case, seed=1)[0], run(case, seed=2)[0])


def test_other_shapes_of_the_same_rows() -> None:
    rows = activations(60, 31)
    how: dict[str, Any] = {"rank": 2, "iterations": 3}
    expected = ops.power_iteration(rows, None, torch.tensor([1]), **how)
    for shape in ((3, 20, 31), (2, 3, 10, 31), (60, 1, 31)):
        assert_same(ops.power_iteration(rows.reshape(shape), None, torch.tensor([1]), **how), expected)


def test_addresses(instruction_set: str) -> None:
    rows = activations(70, 37)
    expected = ops.power_iteration(rows, None, torch.tensor([1]), rank=2, iterations=3)
    for offset in (1, 3, 5):
        buffer = torch.full((rows.numel() + 8,), float("nan"))
        shifted = buffer[offset : offset + rows.numel()].view_as(rows).copy_(rows)
        assert_same(ops.power_iteration(shifted, None, torch.tensor([1]), rank=2, iterations=3), expected)


def test_global_generators_are_neither_read_nor_moved() -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        results.append(run((65, 37, 4, 2)))
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])
        assert before[2] == random.getstate()
    # `run` draws its rows from a generator of its own.
    assert_same(*results)


def test_the_input_is_only_read() -> None:
    rows = activations(65, 37)
    mask = torch.arange(65) % 2 == 0
    copies = rows.clone(), mask.clone()
    version = rows._version
    ops.power_iteration(rows, mask, torch.tensor([1]), rank=2, iterations=3)
    assert torch.equal(rows, copies[0])
    assert torch.equal(mask, copies[1])
    assert rows._version == version
