"""The three axes of an optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from zoext import directions, estimators, updates
from zoext.directions import Direction
from zoext.estimators import Estimator
from zoext.updates import LinearUpdate, Update


class Axes(NamedTuple):
    direction: Direction
    estimator: Estimator
    update: Update

    def check(self) -> None:
        """Raises a TypeError for a member of the wrong axis, and a ValueError for an incompatible pair."""
        for axis, kind in _BASES.items():
            member = getattr(self, axis)
            if not isinstance(member, kind):
                raise TypeError(f"{axis} must be a {kind.__name__}, not {member!r}")
        if self.update.sums_coefficients and self.estimator.coefficients_cancel:
            update, estimator = type(self.update).__name__, type(self.estimator).__name__
            raise ValueError(
                f"update: {update} divides by the sum of an estimate's coefficients, which is zero for "
                f"{estimator}; use AdamReplay or SGD, or another estimator"
            )

        is_linear = isinstance(self.update, LinearUpdate) and type(self.update).apply is LinearUpdate.apply
        if self.direction.defers and not is_linear:
            raise ValueError(
                f"update: {type(self.update).__name__} does not add a combination of directions, which "
                "defer=True could hold back; use SGD, or defer=False"
            )

    def recipe(self) -> dict[str, dict[str, Any]]:
        """The name and the fields of each axis, as plain data for checkpoints."""
        return {
            axis: {"name": type(member).__name__, **dataclasses.asdict(member, dict_factory=_plain_dict)}
            for axis, member in self._asdict().items()
        }

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Mapping[str, Any]]) -> Axes:
        """Builds the axes from a recipe whose members are classes of zoext.

        Raises:
            ValueError: for a member that zoext does not define, or for fields that it does not accept.
        """
        return cls(*(_member(axis, base, recipe[axis]) for axis, base in _BASES.items()))


#: Option values that were renamed; files written by earlier versions contain the old names.
_FORMER_VALUES = {("ActivationSubspace", "balance"): {"printed": "paper", "still": "freeze"}}


#: Options of a later version, with the values that say what earlier versions did.
_LATER_OPTIONS: dict[str, dict[str, Any]] = {"LowRank": {"defer": False}}


def with_current_names(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A recipe from a file, with old option values replaced by their current names."""
    found = {axis: {**_later_options(member), **member} for axis, member in recipe.items()}
    for (name, option), former in _FORMER_VALUES.items():
        for member in found.values():
            value = member.get(option)
            if member.get("name") == name and isinstance(value, str):
                member[option] = former.get(value, value)
    return found


def _later_options(member: Mapping[str, Any]) -> dict[str, Any]:
    name = member.get("name")
    return _LATER_OPTIONS.get(name, {}) if isinstance(name, str) else {}


_BASES: dict[str, type] = {"direction": Direction, "estimator": Estimator, "update": Update}
_MODULES = {"direction": directions, "estimator": estimators, "update": updates}


def _member(axis: str, base: type, recipe: Mapping[str, Any]) -> Any:
    fields = dict(recipe)
    name = fields.pop("name", None)
    kind = getattr(_MODULES[axis], name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, base) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"{axis} {name!r} is not one of zoext; give an optimizer that was built with it")
    known = {field.name for field in dataclasses.fields(kind)}
    if fields.keys() != known:
        raise ValueError(f"{axis} {name} has the fields {', '.join(sorted(known))}, not {', '.join(fields)}")
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{axis} {name}: {error}") from None


def _plain_dict(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Converts tuples to lists, as a round trip through JSON does."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}
