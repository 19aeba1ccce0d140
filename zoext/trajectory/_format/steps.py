"""The lines after the header: one per step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from zoext.trajectory._format.fields import Fields, is_hexadecimal, is_integer, is_number
from zoext.trajectory._format.frames import Place

LARGEST_SINGLE = 3.4028234663852886e38

#: Ascending keys as ranges ``[first, end)`` that neither touch nor overlap.
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Setting:
    """The options of a step that rarely change; a line holds only those that differ from the previous line.

    Attributes:
        mu, weight_decay: of each parameter group.
        moves: the keys of the parameters that move.
    """

    mu: tuple[float, ...]
    weight_decay: tuple[float, ...]
    moves: Ranges

    @classmethod
    def parse(cls, fields: Fields, groups: int, keys: int, previous: Setting | None) -> Setting:
        mu, decay, moves = (
            None if fields.has(name) else getattr(previous, name, None)
            for name in ("mu", "weight_decay", "moves")
        )
        if previous is not None and None not in (mu, decay, moves):
            return previous
        mu = _of_groups(fields, "mu", groups) if mu is None else mu
        if min(mu) <= 0:
            raise fields.error(f"mu must be positive, not {min(mu)}")
        decay = _of_groups(fields, "weight_decay", groups) if decay is None else decay
        return cls(mu, decay, _moves(fields, keys) if moves is None else moves)

    def record(self, previous: Setting | None) -> dict[str, Any]:
        """The options that differ from those of the ``previous`` step."""
        names = ("mu", "weight_decay", "moves")
        now = {name: getattr(self, name) for name in names}
        return {name: now[name] for name in names if now[name] != getattr(previous, name, None)}


@dataclass(frozen=True)
class StepRecord:
    """An ``AppliedStep`` as plain numbers.

    Attributes:
        number: how many steps had been taken after this one.
        seeds: unsigned 64-bit integers.
        lr: of each parameter group.
        frame: the place of the frame in the side file; None if the trajectory has none.
        merged: whether what the steps before it held back was written by a look, see ``LowRank(defer=True)``.

    The other attributes are those of ``Estimate``.
    """

    number: int
    seeds: tuple[int, ...]
    coefficients: tuple[float, ...]
    loss: float
    loss_std: float
    finite: bool
    forwards: int
    lr: tuple[float, ...]
    setting: Setting
    frame: Place | None
    merged: bool = False

    @classmethod
    def parse(cls, record: Any, where: str, groups: int, keys: int, previous: Setting | None) -> StepRecord:
        """The step in a JSON record of a run with this many parameter groups and keys.

        ``previous`` is the setting of the step before.

        Raises:
            TrajectoryError: for a field that is missing or invalid.
        """
        fields = Fields(record, where)
        seeds = fields.list_of("seeds", is_hexadecimal, "16 hexadecimal digits each")
        coefficients = fields.list_of("coefficients", _is_single, "numbers of float32")
        if len(seeds) != len(coefficients):
            raise fields.error(f"has {len(seeds)} seeds and {len(coefficients)} coefficients")
        return cls(
            number=fields.integer("step", 1),
            seeds=tuple(int(seed, 16) for seed in seeds),
            coefficients=tuple(map(float, coefficients)),
            loss=fields.number_or_null("loss"),
            loss_std=fields.number_or_null("spread"),
            finite=fields.flag("finite"),
            forwards=fields.integer("forwards", 0),
            lr=_of_groups(fields, "lr", groups),
            setting=Setting.parse(fields, groups, keys, previous),
            frame=Place.parse(fields) if fields.has("frame") else None,
            merged=fields.has("merged") and fields.flag("merged"),
        )

    def record(self, previous: Setting | None) -> dict[str, Any]:
        """The JSON record of this step; ``previous`` is the setting of the step before."""
        frame = {"frame": list(self.frame)} if self.frame is not None else {}
        return {
            "step": self.number,
            "seeds": [f"{seed:016x}" for seed in self.seeds],
            "coefficients": self.coefficients,
            "lr": self.lr,
            "loss": _finite_or_none(self.loss),
            "spread": _finite_or_none(self.loss_std),
            "finite": self.finite,
            "forwards": self.forwards,
            **self.setting.record(previous),
            **frame,
            **({"merged": True} if self.merged else {}),
        }


def ranges(keys: Iterable[int]) -> Ranges:
    """Ascending keys as ranges."""
    found: list[tuple[int, int]] = []
    for key in keys:
        if found and found[-1][1] == key:
            found[-1] = (found[-1][0], key + 1)
        else:
            found.append((key, key + 1))
    return tuple(found)


def keys_in(moves: Ranges) -> list[int]:
    """The keys in ranges, ascending."""
    return [key for first, end in moves for key in range(first, end)]


def _is_single(value: Any) -> bool:
    return is_number(value) and abs(value) <= LARGEST_SINGLE


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _of_groups(fields: Fields, name: str, groups: int) -> tuple[float, ...]:
    values = fields.list_of(name, is_number, "finite numbers")
    if len(values) != groups:
        raise fields.error(f"{name} has {len(values)} numbers for {groups} parameter groups")
    return tuple(map(float, values))


def _moves(fields: Fields, keys: int) -> Ranges:
    pairs = fields.list_of("moves", _is_range, f"[first, end) in 0 .. {keys}")
    if any(end > keys for _, end in pairs):
        raise fields.error(f"moves must be ranges in 0 .. {keys}")
    if not pairs or any(end > first for (_, end), (first, _) in pairwise(pairs)):
        raise fields.error("moves must be ranges in ascending order, at least one")
    return tuple((first, end) for first, end in pairs)


def _is_range(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(is_integer(end, 0, 2**32) for end in value) and value[0] < value[1]
