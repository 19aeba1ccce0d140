"""Warnings that name the line of the user's program."""

from __future__ import annotations

import sys
import warnings

#: The packages between a user's line and a warning.
_PASSED_OVER = {
    "zoext",
    "torch",
    "contextlib",
    "transformers",
    "accelerate",
    "lightning",
    "pytorch_lightning",
}


def warn(message: str) -> None:
    """Warns at the first caller outside zoext and the frameworks that call it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
