"""Shared by the tests of commands on several ranks: one process that has imported everything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.launched_commands import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()
