"""The reference backend draws Random123's words, and normals within 1e-6 of the kernels'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support import oracle
from zoext import _C, _reference, noise
from zoext._reference import field
from zoext._reference.places import Places, chunks
from zoext.ops import Distribution, Span, Stream

CPU = torch.device("cpu")
SEEDS = (0, 5, -7, 2**62 + 3, -(2**63))
SPANS: tuple[Span, ...] = ((2, 50, 0), (7, 4, 11), (2**40 + 3, 5, 5), (2**62 - 1, 40, 40), (3, 1, 4))


def words_of(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> list[int]:
    seed = torch.tensor([noise.signed(key[1] << 32 | key[0])])
    words = tuple(torch.tensor([word]) for word in counter)
    return field.philox4x32(words, field.round_keys(seed, rounds)[0])[0].tolist()  # type: ignore[arg-type]


# Random123, tests/kat_vectors: counter, key, and the output of ten and of seven rounds.
@pytest.mark.parametrize(
    ("counter", "key", "ten", "seven"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
            [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48],
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
            [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662],
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_words_are_random123s(
    counter: tuple[int, ...], key: tuple[int, int], ten: list[int], seven: list[int]
) -> None:
    assert words_of(counter, key, 10) == ten
    assert words_of(counter, key, 7) == seven


@pytest.mark.parametrize("first", [0, 2**32 - 2, 2**61 - 3])
def test_words_are_those_of_the_kernels(first: int) -> None:
    blocks = torch.arange(first, first + 5)
    for seed in SEEDS:
        words = field.words(field.round_keys(torch.tensor([seed]))[0], 2**32 - 1, 6, blocks)
        expected = _C.words(seed % 2**64, key=2**32 - 1, stream=6, first_block=first, blocks=5)
        np.testing.assert_array_equal(words.numpy(), expected)


def test_normals_of_seed_42_are_cuRANDs() -> None:
    """What a host program with curand_init(42, 0, 0) prints, to its six digits."""
    printed = [0.194019, -0.970190, 1.923927, -1.235621, 0.139138, -0.073182, 0.326683, -1.106665]
    z = torch.empty(8)
    _reference.normal_([z], torch.tensor([42]), [0], [0, 8, 0], Stream.DENSE, Distribution.NORMAL)
    np.testing.assert_allclose(z, printed, rtol=0, atol=2e-6)


def pairs(kind: str) -> np.ndarray:
    """Words [n, 2]: of any kind; with large normals; with small ones; where the formula changes."""
    random = np.random.default_rng(3)
    first, second = random.integers(2**32, size=(2, 2**20), dtype=np.uint32)
    if kind == "large":
        first = first >> random.integers(12, 32, size=2**20, dtype=np.uint32)
    elif kind == "small":
        first = ~(first >> np.uint32(14))
    elif kind == "edges":
        powers = [2**k for k in range(32)] + [2**32 - 2**k for k in range(32)] + [k * 2**29 for k in range(8)]
        edges = np.array([(p + d) % 2**32 for p in powers for d in (-1, 0, 1)], dtype=np.uint32)
        first, second = (side.reshape(-1) for side in np.meshgrid(edges, edges))
    return np.stack((first, second), axis=-1)


@pytest.mark.parametrize("kind", ["any", "large", "small", "edges"])
def test_normals_are_within_1e_6_of_the_kernels(kind: str) -> None:
    words = pairs(kind)
    z = field.normals_of_words(torch.from_numpy(words.astype(np.int64))).reshape(-1).numpy()
    assert np.abs(z.astype(np.float64) - _C.normals_of_words(words)).max() <= 1e-6
    assert np.abs(z - oracle.exact_box_muller(words).reshape(-1)).max() <= 1.5e-6


@pytest.mark.parametrize("span", SPANS)
def test_each_element_has_the_random_numbers_of_its_index(span: Span) -> None:
    """Whichever chunk it is in."""
    at = oracle.indices(50, span)
    for seed in SEEDS:
        keys, rounding = (make(torch.tensor([seed]))[0] for make in (field.round_keys, field.rounding_keys))
        for start, count in ((0, 50), (3, 17), (49, 1)):
            places, here = Places(start, count, span, CPU), at[start : start + count]
            np.testing.assert_array_equal(places.indices.numpy(), here.astype(np.int64))
            z = field.NoiseTerm(keys, 3, Distribution.NORMAL).at(places, torch.float32)
            np.testing.assert_allclose(z, oracle.normals(seed, 3, here), rtol=0, atol=1e-6)
            signs = field.NoiseTerm(keys, 3, Distribution.SIGN).at(places, torch.float32)
            np.testing.assert_array_equal(signs, oracle.signs(seed, 3, here))
            bits = field.RoundingBits(rounding, 3).at(places)
            np.testing.assert_array_equal(bits, oracle.rounding_bits(seed, 3, here))


@pytest.mark.parametrize("columns", [1, 7, 2**17 + 1, 2**18, 2**18 + 3])
def test_chunks_cover_a_tensor_by_whole_rows_or_parts_of_one(columns: int) -> None:
    count = 3 * max(columns, 2**18 // 3) // columns * columns
    end = 0
    for places in chunks(count, (0, count, 0), CPU, columns):
        assert places.start == end
        assert places.count <= 2**18
        first, last = (place // columns for place in (end, end + places.count - 1))
        assert first == last or (end % columns == 0 and places.count % columns == 0)
        end += places.count
    assert end == count
