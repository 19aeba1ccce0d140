"""Matrices whose singular values are known, and how far a basis lies from their singular subspaces."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def flat(leading: int, count: int) -> np.ndarray:
    """Singular values 2 ** (leading - 1) ... 2, 1: the leading ones halve, the tail is flat."""
    values = np.ones(count)
    values[:leading] = 2.0 ** np.arange(leading, 0, -1)
    return values


def geometric(leading: int, count: int) -> np.ndarray:
    """As ``flat``, but the tail falls by a tenth from value to value."""
    values = flat(leading, count)
    values[leading:] = 0.9 ** np.arange(count - leading)
    return values


def matrix(tokens: int, features: int, values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random matrix with these singular values, and its right singular vectors as rows."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.standard_normal((tokens, len(values))))[0]
    right = np.linalg.qr(random.standard_normal((features, len(values))))[0]
    return (left * values) @ right.T, right.T


def leading_vectors(rows: Tensor, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The exact leading right singular vectors (as rows) of [..., d], and all singular values."""
    flattened = rows.double().reshape(-1, rows.shape[-1]).numpy()
    _, values, vectors = np.linalg.svd(flattened, full_matrices=False)
    return vectors[:rank], values


def sine(basis: Tensor, vectors: np.ndarray) -> float:
    """The sine of the largest principal angle between the row spaces of two orthonormal sets."""
    rows = basis.double().numpy()
    assert rows.shape == vectors.shape
    return float(np.linalg.norm(rows - (rows @ vectors.T) @ vectors, 2))


def departure_from_orthonormal(basis: Tensor) -> float:
    rows = basis.double()
    return float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max())
