"""Which examples a step sees: a pure function of the run's seed and the step."""

from __future__ import annotations

import hashlib
from functools import lru_cache


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    # Sorting by a hash shuffles the same way in every version of Python and NumPy, so that a run
    # can be resumed elsewhere; no generator state is kept.
    def digest(index: int) -> bytes:
        return hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=16).digest()

    return sorted(range(size), key=digest)


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> list[int]:
    """The examples of step ``step``, out of ``size``: shuffled anew each epoch, none left out."""
    first = step * batch_size
    return [
        _epoch_order(seed, position // size, size)[position % size]
        for position in range(first, first + batch_size)
    ]
