"""The seeds of a run's draws are a pure function of (seed, step, draw), and never the same twice."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from support import oracle
from zoext import noise
from zoext.ops import Stream


def from_words(seed: int, step: int, draw: int) -> int:
    """Words 0 (low) and 1 of the block numbered `step`, key `draw`, of the stream for seeds."""
    word = oracle.words(seed, draw, Stream.SEED, step)
    return int(word[1]) << 32 | int(word[0])


def test_seeds_are_words_of_their_own_stream() -> None:
    random = np.random.default_rng(0)
    for _ in range(500):
        seed, step = (int(number) for number in random.integers(2**64, size=2, dtype=np.uint64))
        draw = int(random.integers(2**32))
        assert noise.step_seed(seed, step, draw) == from_words(seed, step, draw)


def test_known_answers_never_change() -> None:
    """Recorded runs name seeds; the first is checked by the known answers of Philox through the oracle."""
    for arguments in ((0, 0, 0), (42, 1000, 3), (2**64 - 1, 2**64 - 1, 2**32 - 1), (-1, 2**33, 1)):
        value = noise.step_seed(*arguments)
        assert type(value) is int
        assert value == from_words(*arguments)


@pytest.mark.parametrize("seed", [0, 1, 2**63, -1])
def test_no_two_draws_of_a_run_share_a_seed(seed: int) -> None:
    """False-alarm rate: below 1e-10 (20,000 draws from 2**64)."""
    steps = [*range(2000), *range(10**6, 10**6 + 500)]
    seeds = {noise.step_seed(seed, step, draw) for step in steps for draw in range(8)}
    assert len(seeds) == 8 * len(steps)


def test_no_two_runs_share_a_seed() -> None:
    runs = [*range(1000), *(2**bit for bit in range(10, 64))]
    seeds = {noise.step_seed(run, step) for run in runs for step in range(10)}
    assert len(seeds) == 10 * len(runs)


def test_the_draw_defaults_to_the_first() -> None:
    assert noise.step_seed(8, 9) == noise.step_seed(8, 9, 0) != noise.step_seed(8, 9, 1)


def test_negative_seeds_are_their_64_bit_values() -> None:
    for seed in (-1, -(2**63), -12345):
        assert noise.step_seed(seed, 4, 2) == noise.step_seed(seed + 2**64, 4, 2)
        assert noise.normal(9, seed=seed).equal(noise.normal(9, seed=seed + 2**64))


def test_two_processes_agree() -> None:
    arguments = [(seed, step, draw) for seed in (0, -7, 2**63) for step in (0, 2**40) for draw in (0, 5)]
    program = (
        "from zoext import noise; "
        f"print([noise.step_seed(*a) for a in {arguments}], noise.normal(5, seed=-7).tolist())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = [noise.step_seed(*a) for a in arguments], noise.normal(5, seed=-7).tolist()
    assert there.stdout == f"{here[0]} {here[1]}\n"
