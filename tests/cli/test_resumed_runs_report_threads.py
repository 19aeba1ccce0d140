"""A run that is resumed with another number of threads warns that its bits may differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.finetune_command import Command, prepare
from zoext.cli import main


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def resumed(command: Command, *more: str) -> str:
    command.capsys.readouterr()
    assert main(command.arguments("--resume", *more)) == 0
    return command.capsys.readouterr().err


@pytest.mark.parametrize("kind", ["weights", "trajectory"])
def test_another_number_of_threads(command: Command, set_threads: Callable[[int], None], kind: str) -> None:
    set_threads(1)
    command.works(f"--checkpoint={kind}")
    assert resumed(command, "--steps=3") == ""
    set_threads(2)
    said = resumed(command, "--steps=4")
    assert said.startswith("zoext: warning: torch has 2 threads, and the run had 1: ")
    assert said.count("\n") == 1
    assert "--threads 1" in said
    assert resumed(command, "--steps=5") == ""
