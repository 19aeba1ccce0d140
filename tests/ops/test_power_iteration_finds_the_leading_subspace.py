"""The basis of ``power_iteration`` spans the leading right singular subspace, also where that is hard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from support import oracle, spectra
from zoext import noise, ops
from zoext.ops import Stream

SEED = torch.tensor([2**40 + 3])
RANKS = (1, 2, 4, 8)
SHAPES = ((257, 129), (201, 333), (64, 512), (129, 97))


def leading(
    rows: Tensor, rank: int, iterations: int = 5, *, mask: Tensor | None = None, seed: Tensor = SEED
) -> tuple[Tensor, Tensor]:
    basis, values = ops.power_iteration(rows, mask, seed, rank=rank, iterations=iterations)
    assert basis.shape == (rank, rows.shape[-1])
    assert values.shape == (rank,)
    assert basis.dtype == values.dtype == torch.float32
    assert basis.is_contiguous()
    assert not values[1:].gt(values[:-1]).any()
    return basis, values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("spectrum", [spectra.flat, spectra.geometric], ids=["flat", "geometric"])
def test_a_gap_of_two_is_enough(spectrum: type, rank: int, shape: tuple[int, int]) -> None:
    """Within 1e-3 at five iterations. A plain power iteration misses that on every flat one of these.

    The seeds are fixed, so nothing fails by chance.
    """
    values = spectrum(rank, min(shape))
    for seed in range(5):
        rows, vectors = spectra.matrix(*shape, values, seed)
        basis, found = leading(torch.tensor(rows, dtype=torch.float32), rank, seed=torch.tensor([seed]))
        assert spectra.sine(basis, vectors[:rank]) < 1e-3
        assert spectra.departure_from_orthonormal(basis) < 1e-5
        np.testing.assert_allclose(found, values[:rank], rtol=2e-6)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    """Compared with the exact subspace of the rounded input."""
    rows, _ = spectra.matrix(83, 147, spectra.flat(3, 83), 1)
    stored = torch.tensor(rows).to(dtype).reshape(1, 83, 147)
    vectors, values = spectra.leading_vectors(stored, 3)
    basis, found = leading(stored, 3)
    assert spectra.sine(basis, vectors) < 1e-4
    assert spectra.departure_from_orthonormal(basis) < 1e-5
    np.testing.assert_allclose(found, values[:3], rtol=2e-6)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_storage_changes_no_bit_that_it_holds(dtype: torch.dtype) -> None:
    rows = torch.randn(70, 45, generator=torch.Generator().manual_seed(1)).bfloat16()
    for found, expected in zip(leading(rows.to(dtype), 2), leading(rows.float(), 2), strict=True):
        if dtype is not torch.float16:  # it lacks the range of bfloat16
            oracle.assert_same_bits(found, expected)


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_without_iterations_it_spans_the_random_start(rank: int) -> None:
    """Omega's element (token, j) is number ``token * rank + j`` of the field's power iteration stream."""
    tokens, features = 150, 67
    rows = torch.randn(tokens, features, generator=torch.Generator().manual_seed(2))
    omega = noise.normal((tokens, rank), seed=int(SEED), stream=Stream.POWER_ITERATION).double()
    start = np.linalg.qr((rows.double().T @ omega).numpy())[0].T
    basis, values = leading(rows, rank, iterations=0)
    assert spectra.sine(basis, start) < 1e-4
    assert spectra.departure_from_orthonormal(basis) < 1e-5
    exact = np.linalg.svd(rows.double().numpy() @ start.T, compute_uv=False)
    np.testing.assert_allclose(values, exact, rtol=1e-4)


def test_more_iterations_come_nearer() -> None:
    rows, vectors = spectra.matrix(150, 90, spectra.geometric(2, 90), 3)
    sines = [spectra.sine(leading(torch.tensor(rows), 2, k)[0], vectors[:2]) for k in range(4)]
    assert sines == sorted(sines, reverse=True)
    assert sines[0] > 100 * sines[3]


@pytest.mark.parametrize("rank", [1, 7, 33])
@pytest.mark.parametrize("iterations", [3, 1000])
def test_the_whole_space(rank: int, iterations: int) -> None:
    """As many vectors as dimensions, and far more iterations than there are vectors to find."""
    rows = torch.randn(90, 33, generator=torch.Generator().manual_seed(4))
    basis, values = leading(rows, rank, iterations)
    assert spectra.departure_from_orthonormal(basis) < 1e-5
    if rank == 33 or iterations == 1000:
        np.testing.assert_allclose(values, spectra.leading_vectors(rows, rank)[1][:rank], rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 4])
def test_masked_rows_contribute_nothing(rank: int) -> None:
    """Not even where they are not finite; also when whole chunks of rows are masked."""
    rows, _ = spectra.matrix(260, 75, spectra.flat(rank, 75), 5)
    batch = torch.tensor(rows, dtype=torch.float32).reshape(2, 130, 75)
    mask = torch.rand(2, 130, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[0, 60:] = False
    mask[1, 100:] = False
    vectors, values = spectra.leading_vectors(batch[mask], rank)
    expected = leading(batch, rank, mask=mask)
    assert spectra.sine(expected[0], vectors) < 2e-2  # the gap of what is left is below two
    np.testing.assert_allclose(expected[1], values[:rank], rtol=1e-3)
    for filling in (0.0, float("nan"), float("inf"), 1e38):
        batch[~mask] = filling
        for found, want in zip(leading(batch, rank, mask=mask), expected, strict=True):
            oracle.assert_same_bits(found, want, f"filled with {filling}")
    without = leading(batch[mask], rank, iterations=40)[0]
    assert spectra.sine(without, vectors) < 1e-4


def test_a_mask_of_ones_is_no_mask() -> None:
    rows = torch.randn(3, 50, 20, generator=torch.Generator().manual_seed(6))
    ones = torch.ones(3, 50, dtype=torch.bool)
    for found, expected in zip(leading(rows, 3, mask=ones), leading(rows, 3), strict=True):
        oracle.assert_same_bits(found, expected)


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-10, 1e10, 1e25, 1e33])
def test_magnitudes_do_not_matter(scale: float) -> None:
    rows, vectors = spectra.matrix(100, 61, spectra.flat(3, 61), 7)
    basis, values = leading(torch.tensor(rows * scale, dtype=torch.float32), 3)
    assert spectra.sine(basis, vectors[:3]) < 1e-3
    np.testing.assert_allclose(values.double() / scale, [8, 4, 2], rtol=1e-5)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_massive_dimension_hides_no_other_vector(seed: int, constant: bool) -> None:
    """Activations of language models have dimensions ten thousand times as large as the others."""
    rows, _ = spectra.matrix(256, 384, spectra.flat(3, 256), seed)
    random = np.random.default_rng(seed)
    rows[:, 131] = 1e4 * (1.0 if constant else random.standard_normal(256)) * np.abs(rows).max()
    vectors, values = spectra.leading_vectors(torch.tensor(rows, dtype=torch.float32), 4)
    assert values[0] > 5e3 * values[1]
    basis, found = leading(torch.tensor(rows, dtype=torch.float32), 4)
    assert spectra.sine(basis, vectors) < 5e-3
    assert spectra.departure_from_orthonormal(basis) < 1e-5
    np.testing.assert_allclose(found, values[:4], rtol=1e-4)


def test_a_massive_direction_that_is_no_axis() -> None:
    rows, vectors = spectra.matrix(256, 384, np.r_[2e3, spectra.flat(3, 255)], 8)
    basis, values = leading(torch.tensor(rows, dtype=torch.float32), 4)
    assert spectra.sine(basis, vectors[:4]) < 5e-3
    np.testing.assert_allclose(values, [2e3, 8, 4, 2], rtol=1e-3)


def repeated_row() -> Tensor:
    return torch.randn(1, 19, generator=torch.Generator().manual_seed(9)).repeat(100, 1)


DEFICIENT = {
    "one token": (torch.randn(1, 19, generator=torch.Generator().manual_seed(9)), 1),
    "a vector": (torch.randn(19, generator=torch.Generator().manual_seed(9)), 1),
    "fewer tokens than vectors": (torch.randn(2, 19, generator=torch.Generator().manual_seed(9)), 2),
    "repeated rows": (repeated_row(), 1),
    "two kinds of rows": (torch.cat([repeated_row(), torch.eye(19)[3:4]]), 2),
    "rank three": (
        torch.randn(300, 3, generator=torch.Generator().manual_seed(9))
        @ torch.randn(3, 19, generator=torch.Generator().manual_seed(10)),
        3,
    ),
    "all zero": (torch.zeros(70, 19), 0),
    "one number": (torch.eye(19)[5:6] * 3, 1),
    "no tokens": (torch.zeros(0, 19), 0),
    "no tokens of three dimensions": (torch.zeros(4, 0, 19), 0),
}


@pytest.mark.parametrize("name", DEFICIENT)
@pytest.mark.parametrize("iterations", [0, 3])
def test_vectors_beyond_the_rank_are_zero(name: str, iterations: int) -> None:
    rows, rank = DEFICIENT[name]
    basis, values = leading(rows, 4, iterations)
    assert (values[:rank] > 0).all()
    assert (values[rank:] == 0).all()
    assert (basis[rank:] == 0).all()
    if rank:
        vectors, exact = spectra.leading_vectors(rows, rank)
        assert spectra.sine(basis[:rank], vectors) < 1e-5
        assert spectra.departure_from_orthonormal(basis[:rank]) < 1e-5
        np.testing.assert_allclose(values[:rank], exact[:rank], rtol=1e-5)


def test_nothing_counts() -> None:
    mask = torch.zeros(70, dtype=torch.bool)
    basis, values = leading(torch.full((70, 9), float("nan")), 2, mask=mask)
    assert (basis == 0).all()
    assert (values == 0).all()


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (99, 40), (64, 7)])
def test_a_row_that_is_not_finite_gives_no_basis(
    place: tuple[int, int], bad: float, dtype: torch.dtype
) -> None:
    rows = torch.randn(100, 41, generator=torch.Generator().manual_seed(11)).to(dtype)
    rows[place] = bad
    basis, values = leading(rows, 3)
    assert (basis == 0).all()
    assert values.isnan().all()


def test_a_double_beyond_float32_is_not_finite() -> None:
    rows = torch.ones(3, 4, dtype=torch.float64)
    rows[1, 2] = 1e39
    basis, values = leading(rows, 1)
    assert (basis == 0).all()
    assert values.isnan().all()
