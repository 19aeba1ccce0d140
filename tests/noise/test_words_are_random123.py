"""The words of the noise field are Philox4x32-10's: Random123's and cuRAND's, counter for counter."""

from __future__ import annotations

import numpy as np
import pytest

from support import oracle
from zoext import _C

# Random123, tests/kat_vectors (counter, key, output), and curand_init(42, subsequence, 4 * block).
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
    "seed 42": ((0, 0, 0, 0), (42, 0), (0x9CEAF053, 0x77F5493B, 0x12BF50AD, 0x5742B3D7)),
    "seed 42, block 1": ((1, 0, 0, 0), (42, 0), (0xFCDB2127, 0x53BA6CFD, 0x838F5A6E, 0x744E06FB)),
    "seed 42, subsequence 7": ((0, 0, 7, 0), (42, 0), (0x67EE6F2C, 0xE55410CC, 0x6C7ECA35, 0x557398D3)),
}
known_answers = pytest.mark.parametrize(
    ("counter", "key", "output"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys()
)


@known_answers
def test_core_gives_the_known_answers(counter: tuple, key: tuple, output: tuple) -> None:
    seed, block = key[1] << 32 | key[0], counter[1] << 32 | counter[0]
    words = _C.words(seed, key=counter[2], stream=counter[3], first_block=block, blocks=1)
    assert words.shape == (1, 4)
    assert tuple(words[0].tolist()) == output


@known_answers
def test_oracle_gives_the_known_answers(counter: tuple, key: tuple, output: tuple) -> None:
    assert tuple(oracle.philox4x32(counter, key).tolist()) == output


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("zeros", (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ("ones", (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        ("pi", (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ],
)
def test_oracle_gives_the_known_answers_of_seven_rounds(name: str, output: tuple) -> None:
    """Random123, tests/kat_vectors, philox4x32 7: the words of rounding bits, of which the operators' are
    compared with the oracle's."""
    counter, key, _ = KNOWN_ANSWERS[name]
    assert tuple(oracle.philox4x32(counter, key, rounds=7).tolist()) == output


def test_random_counters_and_keys_agree_with_the_oracle() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        seed, first = (int(word) for word in random.integers(2**64, size=2, dtype=np.uint64))
        key, stream = (int(word) for word in random.integers(2**32, size=2))
        first = min(first, 2**64 - 3)
        expected = oracle.words(seed, key, stream, [first, first + 1, first + 2])
        actual = _C.words(seed, key=key, stream=stream, first_block=first, blocks=3)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("first", [2**32 - 2, 2**33 - 1, 2**62 - 3])
@pytest.mark.parametrize("seed", [1, 2**63, 2**64 - 1])
def test_block_numbers_carry_into_the_second_counter_word(seed: int, first: int) -> None:
    blocks = np.arange(first, first + 6, dtype=np.uint64)
    actual = _C.words(seed, key=3, stream=2, first_block=first, blocks=6)
    np.testing.assert_array_equal(actual, oracle.words(seed, 3, 2, blocks))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 0, "key": 2**32}, "key"),
        ({"seed": 0, "stream": -1}, "stream"),
        ({"seed": 0, "first_block": 2**64}, "first_block"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be an integer in 0"):
        _C.words(**arguments)
