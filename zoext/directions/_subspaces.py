"""The leading subspaces of activations, as far as they were seen, by the uses of a matrix."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Subspace:
    """Leading right singular vectors of activations and their singular values.

    Attributes:
        basis: float32 [rank, d], a vector a row.
        values: float32 [rank].
    """

    basis: Tensor
    values: Tensor

    @property
    def rows(self) -> Tensor:
        """Rows [rank, d] with the same leading subspace and values as the activations."""
        return self.values.unsqueeze(1) * self.basis


@dataclass(slots=True)
class Found:
    """The subspaces of a matrix, or of the entries of a stack that saw activations.

    Attributes:
        sides: the sides that the matrix was used from, "left" and "right".
        entries: by their numbers in the stack; None is the whole parameter.
    """

    sides: set[str] = field(default_factory=set)
    entries: dict[int | None, Subspace] = field(default_factory=dict)

    def basis(self, count: int | None) -> Tensor:
        """[rank, d], or [count, rank, d] for a stack, with zeros for entries that saw nothing."""
        return _stacked({entry: each.basis for entry, each in self.entries.items()}, count)

    def rows(self, count: int | None) -> Tensor:
        """``Subspace.rows`` in the shape of ``basis``."""
        return _stacked({entry: each.rows for entry, each in self.entries.items()}, count)


def kind_of(uses: Set[str]) -> str:
    """The kind of the directions of a matrix, as ``Frame.kind`` names it, that a forward used in some ways.

    Args:
        uses: "left" and "right" if it was multiplied with activations on that side; "other" if it was read in
            another way. Empty if the forward did not use it.
    """
    sides = uses & {"left", "right"}
    if len(sides) == 1:
        return next(iter(sides))
    return "dense" if uses else "unused"


def _stacked(entries: dict[int | None, Tensor], count: int | None) -> Tensor:
    if count is None:
        return entries[None]
    some = next(iter(entries.values()))
    stacked = some.new_zeros((count, *some.shape))
    for entry, matrix in entries.items():
        stacked[entry] = matrix
    return stacked
