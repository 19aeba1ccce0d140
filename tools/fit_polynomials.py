"""Fits the polynomials of csrc/core/normal.h and prints them as C++ constants.

    python tools/fit_polynomials.py

Each polynomial is the minimax fit of its function over its whole reduced interval
(iteratively reweighted least squares at Chebyshev points, in float64). Coefficients are
rounded to float32 from the highest down, the remaining ones refitted after each rounding,
so that the error of the rounded polynomial stays close to that of the exact fit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def minimax(basis: Array, target: Array, weight: Array) -> Array:
    """Coefficients that minimise ``max |weight * (basis @ c - target)|`` (Lawson's algorithm)."""
    lawson = np.full(target.shape, 1.0 / target.size)
    best, best_error = None, np.inf
    for _ in range(400):
        scale = np.sqrt(lawson) * weight
        c = np.linalg.lstsq(basis * scale[:, None], target * scale, rcond=None)[0]
        error = np.abs(weight * (basis @ c - target))
        if error.max() < best_error:
            best, best_error = c, error.max()
        lawson *= error
        lawson /= lawson.sum()
    assert best is not None
    return best


def fit(
    function: Callable[[Array], Array],
    low: float,
    high: float,
    powers: list[int],
    weight: Callable[[Array], Array],
):
    """Float32 coefficients of ``sum_j c_j x**powers[j]`` and the largest weighted error."""
    nodes = np.cos(np.pi * (np.arange(4000) + 0.5) / 4000)
    x = low + (high - low) * (nodes + 1) / 2
    target, w = function(x), weight(x)
    fixed: dict[int, float] = {}
    free = list(powers)
    while free:
        residual = target - sum((c * x**p for p, c in fixed.items()), np.zeros_like(x))
        c = minimax(np.stack([x**p for p in free], 1), residual, w)
        fixed[free[-1]] = float(np.float32(c[-1]))
        free.pop()
    value = sum(c * x**p for p, c in fixed.items())
    return [fixed[p] for p in powers], float(np.abs(w * (value - target)).max())


def show(name: str, coefficients: list[float], error: float) -> None:
    print(f"// {name}: largest error {error:.1e}")
    print(", ".join(f"{c.hex()}f /* {c:.9g} */" for c in coefficients))


def main() -> None:
    one = np.ones_like
    for degree in (6, 7, 8, 9):
        powers = list(range(degree + 1))
        c, e = fit(lambda w: -2 * np.log1p(-w) / w, 1e-12, 0.5, powers, lambda w: w / (-2 * np.log1p(-w)))
        show(f"-2 log(1 - w) / w, 0 < w <= 1/2, relative, degree {degree}", c, e)
    for count in (4, 5):
        powers = list(range(0, 2 * count, 2))
        c, e = fit(lambda a: np.sin(2 * np.pi * a) / a, 1e-9, 0.25, powers, lambda a: a)
        show(f"sin(2 pi a) / a, |a| <= 1/4 turn, absolute in the sine, {count} terms", c, e)
    for count in (4, 5):
        powers = list(range(0, 2 * count, 2))
        c, e = fit(lambda a: np.cos(2 * np.pi * a), 0.0, 0.25, powers, one)
        show(f"cos(2 pi a), |a| <= 1/4 turn, absolute, {count} terms", c, e)


if __name__ == "__main__":
    main()
