"""The three axes of an optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from zoext.directions import Direction
from zoext.estimators import Estimator
from zoext.updates import Update


class Axes(NamedTuple):
    direction: Direction
    estimator: Estimator
    update: Update

    def recipe(self) -> dict[str, dict[str, Any]]:
        """The axes by name and fields: plain data, for checkpoints."""
        return {
            axis: {"name": type(member).__name__, **dataclasses.asdict(member, dict_factory=_plain_dict)}
            for axis, member in self._asdict().items()
        }


def _plain_dict(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """With lists for tuples: what a file of JSON gives back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}
