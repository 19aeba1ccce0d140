"""What several test files share."""

from __future__ import annotations

import os
import signal

# Both are read on import. No test contacts a hub. Where several processes test, as many threads in each would
# wait for each other most of the time; tests of threads set their number.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from zoext import _C, _reference

# A shell that starts the tests in the background ignores Ctrl-C for them; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: What an environment may lack: test files that import one of these are skipped there.
OPTIONAL_PACKAGES = frozenset(
    {
        "accelerate",
        "datasets",
        "lightning",
        "matplotlib",
        "peft",
        "safetensors",
        "scipy",
        "tokenizers",
        "tqdm",
        "transformers",
        "trl",
    }
)


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skips a test in which such a package is missing, as for the frames of AGZO."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name in OPTIONAL_PACKAGES:
            pytest.skip(f"{error.name} is not installed")
        raise


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


@pytest.fixture(params=["kernels", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the CPU's kernels, and with the reference backend in their place."""
    name: str = request.param
    library = torch.library.Library("zoext", "IMPL")
    if name == "reference":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of an operator that has a kernel already
            for operator in _reference.OPERATORS:
                library.impl(operator.__name__, operator, "CPU", allow_override=True)
    yield name
    library._destroy()
