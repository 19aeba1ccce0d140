"""The noise field is distributed as it says, and uses that must be independent are.

Every test here is a batch of hypothesis tests with exact or asymptotic p-values. False-alarm rate: 1e-4
for each test function (the smallest p-value against 1e-4 / number of p-values, Bonferroni), so below
2e-3 for the file, over the choice of ``SEED``. With the seed fixed the outcome never changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from support import oracle
from zoext import noise, ops
from zoext.ops import Distribution, Stream

SEED = 20260101
FALSE_ALARM = 1e-4


def assert_plausible(p_values: Iterable[float]) -> None:
    p = np.array(list(p_values))
    threshold = FALSE_ALARM / len(p)
    assert p.min() >= threshold, f"p-value number {p.argmin()} is {p.min():.2e}, below {threshold:.2e}"


def two_sided(z: NDArray | float) -> NDArray:
    return 2 * stats.norm.sf(np.abs(z))


def normals(count: int, *, seed: int = SEED, key: int = 0, stream: int = 0) -> NDArray[np.float64]:
    return noise.normal(count, seed=seed, key=key, stream=stream).double().numpy()


def signs(count: int, *, seed: int = SEED, key: int = 0) -> NDArray[np.float64]:
    out = torch.empty(count)
    span = ops.span_of(out)
    ops.normal_(
        [out], torch.tensor([seed]), [key], [span], stream=Stream.SIGN, distribution=Distribution.SIGN
    )
    return out.double().numpy()


def rounding_bits(count: int, *, seed: int = SEED, key: int = 0) -> NDArray[np.float64]:
    """Of the oracle, whose bits the operators reproduce, in 0 .. 65535."""
    return oracle.rounding_bits(seed, key, np.arange(count, dtype=np.uint64)).astype(np.float64)


def standardised_uniforms(bits: NDArray) -> NDArray:
    return (bits - (2**16 - 1) / 2) / np.sqrt((2.0**32 - 1) / 12)


def correlation_p_values(pairs: Iterable[tuple[NDArray, NDArray]]) -> list[float]:
    """Of independent standardised samples: sum(x y) / sqrt(n) is standard normal for large n."""
    return [float(two_sided(np.multiply(x, y).sum() / np.sqrt(len(x)))) for x, y in pairs]


def standardised_squares(z: NDArray) -> NDArray:
    return (z**2 - 1) / np.sqrt(2)


def test_moments_are_those_of_the_standard_normal() -> None:
    count, z = 2**22, normals(2**22)
    # (power, expectation, variance of one term)
    moments = [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (5, 0, 945), (6, 15, 10170)]
    assert_plausible(
        two_sided((np.mean(z**power) - mean) / np.sqrt(variance / count)) for power, mean, variance in moments
    )


def test_each_lane_is_standard_normal() -> None:
    z = normals(2**21).reshape(-1, 4)
    assert_plausible(stats.kstest(z[:, lane], "norm", method="asymp").pvalue for lane in range(4))


def test_small_and_large_tails_hold_their_share() -> None:
    """Counts beyond 1 to 5 standard deviations on both sides, and in thin slices about zero."""
    count, z = 2**23, normals(2**23, key=1)
    shares = []
    for t in np.arange(1, 5.25, 0.25):
        shares += [(np.count_nonzero(z > t), stats.norm.sf(t)), (np.count_nonzero(z < -t), stats.norm.sf(t))]
    for t in (1e-1, 1e-2, 1e-3, 1e-4):
        inside = stats.norm.cdf(t) - 0.5
        shares += [
            (np.count_nonzero((z > 0) & (z < t)), inside),
            (np.count_nonzero((z < 0) & (z > -t)), inside),
        ]
    assert_plausible(stats.binomtest(int(hits), count, share).pvalue for hits, share in shares)


def test_lanes_and_blocks_do_not_correlate() -> None:
    """Products of neighbours at distances 1 to 24 (six blocks), of the values and of their squares."""
    z = normals(2**20, key=2)
    squares = standardised_squares(z)
    lags = range(1, 25)
    assert_plausible(
        correlation_p_values((x[:-lag].copy(), x[lag:].copy()) for x in (z, squares) for lag in lags)
    )


def test_pairs_of_lanes_do_not_correlate() -> None:
    """Sine and cosine share a radius: their squares correlate unless the radius is Rayleigh's."""
    lanes = normals(2**21, key=3).reshape(-1, 4).T.copy()
    squares = standardised_squares(lanes)
    assert_plausible(
        correlation_p_values((x[i], x[j]) for x in (lanes, squares) for i, j in combinations(range(4), 2))
    )


def test_parameters_of_equal_shape_get_other_noise() -> None:
    """Keys that are neighbours, and keys one bit apart."""
    keys = [0, 1, 2, 3, *(2**bit for bit in range(2, 32))]
    z = [normals(2**14, key=key) for key in keys]
    assert_plausible(correlation_p_values(combinations(z, 2)))


def test_seeds_one_bit_apart_are_independent() -> None:
    reference, others = normals(2**17), [normals(2**17, seed=SEED ^ 1 << bit) for bit in range(64)]
    p_values = correlation_p_values((reference, other) for other in others)
    p_values += correlation_p_values(
        (standardised_squares(reference), standardised_squares(other)) for other in others
    )
    assert_plausible(p_values)


def test_consecutive_seeds_are_independent() -> None:
    """Users take 0, 1, 2 ...; the seeds of a run's steps come from step_seed."""
    plain = [normals(2**14, seed=seed) for seed in range(24)]
    derived = [normals(2**14, seed=noise.step_seed(SEED, step)) for step in range(24)]
    assert_plausible(correlation_p_values([*combinations(plain, 2), *combinations(derived, 2)]))


def test_streams_are_independent() -> None:
    z = [normals(2**18, stream=stream) for stream in Stream]
    assert_plausible(correlation_p_values(combinations(z, 2)))


def test_signs_are_balanced() -> None:
    """In all, and in each of the 128 bits of a block."""
    s = signs(2**21)
    assert set(np.unique(s)) == {-1.0, 1.0}
    per_bit = s.reshape(-1, 128).sum(axis=0) / np.sqrt(len(s) / 128)
    assert_plausible([*two_sided(per_bit), *two_sided([s.sum() / np.sqrt(len(s))])])


def test_signs_run_as_coin_tosses_do() -> None:
    """The number of runs (Wald and Wolfowitz, 1940), and how many runs have each length."""
    s = signs(2**21, key=1)
    ends = np.flatnonzero(s[1:] != s[:-1])
    changes = len(ends)
    lengths = np.diff(ends)
    longest = 12
    observed = np.bincount(np.minimum(lengths, longest), minlength=longest + 1)[1:]
    shares = 0.5 ** np.arange(1, longest + 1)
    shares[-1] *= 2
    assert_plausible(
        [
            float(two_sided((changes - (len(s) - 1) / 2) / np.sqrt((len(s) - 1) / 4))),
            stats.chisquare(observed, shares * len(lengths)).pvalue,
        ]
    )


def test_bytes_of_signs_are_uniform() -> None:
    weights = 2 ** np.arange(8)
    values = ((signs(2**21, key=2).reshape(-1, 8) < 0) @ weights).astype(int)
    assert_plausible([stats.chisquare(np.bincount(values, minlength=256)).pvalue])


def test_pairs_of_signs_do_not_correlate() -> None:
    """Across distances (words, blocks), keys and seeds, and with the dense normals of the same seed."""
    s = signs(2**20, key=3)
    pairs = [(s[:-lag].copy(), s[lag:].copy()) for lag in (*range(1, 33), 64, 96, 128, 256)]
    fields = [signs(2**18, key=key) for key in range(6)]
    fields += [signs(2**18, seed=SEED ^ 1 << bit) for bit in (0, 31, 32, 62)]
    fields.append(normals(2**18))
    assert_plausible(correlation_p_values([*pairs, *combinations(fields, 2)]))


def test_rounding_bits_are_uniform() -> None:
    """Seven rounds suffice: the values, their upper bytes in each place of a block, and each of the bits."""
    bits = rounding_bits(2**22).astype(np.int64)
    by_place = (bits >> 8).reshape(-1, 8).T
    ones = (bits[:, None] >> np.arange(16) & 1).sum(axis=0)
    assert_plausible(
        [
            stats.chisquare(np.bincount(bits, minlength=2**16)).pvalue,
            *(stats.chisquare(np.bincount(place, minlength=256)).pvalue for place in by_place),
            *two_sided((ones - len(bits) / 2) / np.sqrt(len(bits) / 4)),
        ]
    )


def test_rounding_bits_do_not_correlate() -> None:
    """Across distances, keys and seeds one bit apart, and with the normals and signs that they round.

    In half a block, since its other half has the same bytes: see below.
    """
    u = standardised_uniforms(rounding_bits(2**21, key=1))
    first = u.reshape(-1, 2, 8)[:, 0].ravel()
    pairs = [(first[:-lag].copy(), first[lag:].copy()) for lag in (*range(1, 25), 32, 64, 128)]
    fields = [rounding_bits(2**18, key=key) for key in (0, 1, 2, 2**16, 2**31)]
    fields += [rounding_bits(2**18, seed=SEED ^ 1 << bit) for bit in range(0, 64, 7)]
    uniforms = [standardised_uniforms(field) for field in fields]
    p_values = correlation_p_values([*pairs, *combinations(uniforms, 2)])
    others = normals(2**18), standardised_squares(normals(2**18)), signs(2**18)
    assert_plausible([*p_values, *correlation_p_values((uniforms[0], other) for other in others)])


def test_halves_of_a_block_go_up_together_as_if_independent() -> None:
    """Of all words, for every two elements of different halves and many fractions: to 1/1000."""
    byte = np.arange(256, dtype=np.uint32)
    # All that two elements depend on are three bytes; elements of other places have others of the same kind.
    upper, shared, lower = np.meshgrid(byte, byte, byte, indexing="ij", sparse=True)
    for fraction in (1, 3, 40, 256, 300, 5000, 2**15, 65000):
        is_first_up = (upper << 8 | shared) + np.uint32(fraction) >= 2**16
        for other in (1, 3, 40, 255, 256, 2000, 2**14, 65280):
            is_second_up = (shared << 8 | lower) + np.uint32(other) >= 2**16
            both = (is_first_up & is_second_up).mean()
            assert abs(both - fraction * other / 2**32) <= 1 / 1000


def test_two_halves_of_a_block_share_bytes_crosswise() -> None:
    """What the test above takes for granted, of the bits as they are."""
    bits = rounding_bits(2**12).astype(np.int64).reshape(-1, 2, 8)
    for i, j in product(range(8), range(8)):
        first, second = bits[:, 0, i], bits[:, 1, j]
        is_same = {
            (a, b): bool(((first >> a & 255) == (second >> b & 255)).all()) for a in (0, 8) for b in (0, 8)
        }
        in_one_word = i // 2 == j // 2
        crosswise = is_same[0, 8] + is_same[8, 0]
        assert not is_same[0, 0]
        assert not is_same[8, 8]
        assert crosswise == in_one_word


def test_consecutive_steps_round_independently() -> None:
    """The seeds of a run's steps, and the steps from one to the next in neighbouring elements."""
    steps = [
        standardised_uniforms(rounding_bits(2**15, seed=noise.step_seed(SEED, step))) for step in range(24)
    ]
    shifted = [(a[:-1].copy(), b[1:].copy()) for a, b in pairwise(steps)]
    assert_plausible(correlation_p_values([*combinations(steps, 2), *shifted]))
