"""Checks of arguments that several axes take."""

from __future__ import annotations


def check_count(name: str, value: object, least: int = 1, *, meaning: str = "") -> None:
    """Raises a ValueError unless ``value`` is an integer of at least ``least``, and no bool."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return
    counts = f"; it counts {meaning}" if meaning else ""
    raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}{counts}")
