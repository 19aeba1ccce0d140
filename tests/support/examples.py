"""Runs the examples as their users do, in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGEST = 40  # lines


def run(name: str, *options: str) -> dict[str, Any]:
    """Runs a program and returns its globals; skips the test where it is not beside the tests."""
    path = EXAMPLES / name
    if not path.exists():
        pytest.skip("the examples are not beside the tests")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    before = sys.argv
    sys.argv = [str(path), *options]
    try:
        return runpy.run_path(str(path), run_name="__main__" if options else "example")
    finally:
        sys.argv = before
