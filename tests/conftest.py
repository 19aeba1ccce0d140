"""What several test files share."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import: no test contacts a hub

from collections.abc import Callable, Iterator

import pytest
import torch

from zoext import _C

# A shell that starts the tests in the background ignores Ctrl-C for them; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=_C.available_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set of this processor."""
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
