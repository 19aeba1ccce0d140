"""``--options NAME=VALUE,...``: what an optimizer takes beside lr, mu and weight decay."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from typing import Any

#: What has an option of its own, or none.
RESERVED = {
    "params",
    "lr",
    "mu",
    "weight_decay",
    "seed",
    "probe",
    "precision",
    "direction",
    "estimator",
    "update",
    "options",
}


def parse(text: str) -> dict[str, str]:
    """The values by name, as they were written; raises argparse.ArgumentTypeError for another form."""
    pairs = [part.partition("=") for part in text.split(",")]
    names = [name for name, _, _ in pairs]
    if not all(name and equals and value for name, equals, value in pairs) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE,... with each name once, not {text}")
    return {name: value for name, _, value in pairs}


def typed(make: Callable[..., Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The values for ``make``, each of the type of the default there; pairs are written ``a/b``.

    Raises:
        ValueError: for a name that ``make`` does not have or a value of another type.
    """
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if name not in RESERVED and parameter.default is not parameter.empty
    }
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        has = ", ".join(known) if known else "none"
        raise ValueError(f"it has no option {unknown[0]}; its options: {has}")
    return {name: _typed(name, value, known[name]) for name, value in given.items()}


def _typed(name: str, value: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(float(part) for part in value.split("/"))
        if isinstance(default, int | float):
            return type(default)(value)
    except (ValueError, KeyError):
        form = "/".join(map(str, default)) if isinstance(default, tuple) else default
        raise ValueError(f"option {name} must be of the form of {form}, not {value}") from None
    return None if value == "none" else value
