"""``power_iteration`` on CUDA gives the bits of the CPU, and never makes the host wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import spectra
from support.cuda_comparison import DTYPES, MARKS, fakegpu
from zoext import ops

pytestmark = MARKS

SEED = torch.tensor([-(2**62) + 11])


def activations(tokens: int, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens + features))
    if features > 3:
        rows[:, 3] *= 300
    return rows.to(dtype)


def assert_cuda_equals_cpu(rows: Tensor, mask: Tensor | None, rank: int, iterations: int) -> None:
    expected = ops.power_iteration(rows, mask, SEED, rank=rank, iterations=iterations)
    on_device = None if mask is None else mask.cuda()
    found = ops.power_iteration(rows.cuda(), on_device, SEED.cuda(), rank=rank, iterations=iterations)
    for f, e, what in zip(found, expected, ("basis", "values"), strict=True):
        assert f.device.type == "cuda"
        same = (f.cpu().view(torch.int32) == e.view(torch.int32)) | (f.cpu().isnan() & e.isnan())
        assert same.all(), f"{int((~same).sum())} of {same.numel()} numbers of {what} differ"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "features", "rank", "iterations"),
    [(1, 1, 1, 0), (65, 33, 1, 3), (150, 301, 3, 2), (70, 96, 9, 1)],
)
def test_bits(
    tokens: int, features: int, rank: int, iterations: int, dtype: torch.dtype, masked: bool
) -> None:
    mask = torch.arange(tokens) % 5 != 3 if masked else None
    assert_cuda_equals_cpu(activations(tokens, features, dtype), mask, rank, iterations)


def test_many_vectors() -> None:
    """More than a warp has lanes, and as many as there are dimensions."""
    assert_cuda_equals_cpu(activations(130, 70), None, 12, 3)
    assert_cuda_equals_cpu(activations(60, 17), None, 17, 3)


def test_batches_and_masked_chunks() -> None:
    rows = activations(260, 40).reshape(4, 65, 40)
    mask = torch.zeros(4, 65, dtype=torch.bool)
    mask[1, 3:9] = mask[3, 60:] = True
    rows[~mask] = float("nan")
    assert_cuda_equals_cpu(rows, mask, 3, 2)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(70, 9),
        torch.zeros(0, 9),
        torch.ones(70, 9),
        torch.randn(1, 9, generator=torch.Generator().manual_seed(1)),
        torch.eye(9) * 1e-38,
        torch.eye(9) * 1e25,
        torch.eye(9) * 1e-25,
    ],
    ids=["zero", "no tokens", "equal rows", "one token", "subnormal", "huge", "tiny"],
)
def test_deficient_and_extreme_inputs(rows: Tensor) -> None:
    assert_cuda_equals_cpu(rows, None, 4, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(bad: float) -> None:
    rows = activations(70, 9)
    rows[66, 2] = bad
    basis, values = ops.power_iteration(rows.cuda(), None, SEED.cuda(), rank=2, iterations=2)
    assert (basis == 0).all()
    assert values.isnan().all()


def test_the_leading_subspace() -> None:
    rows, vectors = spectra.matrix(129, 97, spectra.flat(2, 97), 1)
    on_device = torch.tensor(rows, dtype=torch.float32).cuda()
    basis, _ = ops.power_iteration(on_device, None, SEED.cuda(), rank=2, iterations=5)
    assert spectra.sine(basis.cpu(), vectors[:2]) < 1e-3


def test_nothing_waits_for_the_host() -> None:
    rows, seed = activations(100, 40).cuda(), SEED.cuda()
    mask = torch.ones(100, dtype=torch.bool).cuda()
    torch.cuda.synchronize()
    before = fakegpu.counters()["launches"] if fakegpu else 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.power_iteration(rows, mask, seed, rank=2, iterations=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if fakegpu:
        assert fakegpu.counters()["launches"] - before == 1 + 3 * 4 + 2


def test_the_mask_and_the_seed_must_be_on_the_device() -> None:
    rows, mask = activations(10, 4).cuda(), torch.ones(10, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="mask must be on the device of input"):
        ops.power_iteration(rows, mask, SEED.cuda(), rank=1, iterations=1)
    with pytest.raises(RuntimeError, match="seed must be on the device"):
        ops.power_iteration(rows, mask.cuda(), SEED, rank=1, iterations=1)


@pytest.mark.skipif(fakegpu is not None, reason="the emulator has no graphs")
def test_a_graph_replays_with_new_activations() -> None:
    rows, seed = activations(100, 40).cuda(), SEED.cuda()
    ops.power_iteration(rows, None, seed, rank=2, iterations=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        basis, values = ops.power_iteration(rows, None, seed, rank=2, iterations=3)
    rows.mul_(2)
    rows[7] = 1
    graph.replay()
    expected = ops.power_iteration(rows, None, seed, rank=2, iterations=3)
    assert torch.equal(basis, expected[0])
    assert torch.equal(values, expected[1])
