"""What several test files share."""

from __future__ import annotations

import os
import signal

# Both are read on import. No test contacts a hub. Where several processes test, as many threads in each would
# wait for each other most of the time; tests of threads set their number.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from zoext import _C

# A shell that starts the tests in the background ignores Ctrl-C for them; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: What an environment may lack: test files that import one of these are skipped there.
OPTIONAL_PACKAGES = frozenset({"matplotlib", "safetensors", "scipy", "tokenizers", "tqdm", "transformers"})


class TestFile(pytest.Module):
    """A test file that is skipped where an optional package that it imports is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and cause.name in OPTIONAL_PACKAGES:
                pytest.skip(f"{cause.name} is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return TestFile.from_parent(parent, path=module_path)


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
