"""Shared by the tests of commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import curves
from support.launched_commands import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """For commands on several ranks: one process that has imported everything."""
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="module", autouse=True)
def without_curves() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        curves.left_out(patch)
        yield
