"""Shared by test files: runs to test with, references to compare with, programs to start."""

from __future__ import annotations

import os
import sys


def environment(**more: str) -> dict[str, str]:
    """The environment of a program that imports what this process can: the same zoext, and this package."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}
