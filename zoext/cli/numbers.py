"""The kinds of numbers that options take; each raises argparse.ArgumentTypeError with what it wants."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def _number(
    kind: Callable[[str], Number], wanted: str, accepts: Callable[[Number], bool]
) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}") from None
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    return parse


positive = _number(float, "finite and > 0", lambda value: math.isfinite(value) and value > 0)
nonnegative = _number(float, "finite and >= 0", lambda value: math.isfinite(value) and value >= 0)
fraction = _number(float, "between 0 and 1", lambda value: 0 < value < 1)
count = _number(int, "an integer of at least 1", lambda value: value >= 1)
whole = _number(int, "an integer of at least 0", lambda value: value >= 0)
seed = _number(int, "an integer of 64 bits", lambda value: -(2**63) <= value < 2**64)
