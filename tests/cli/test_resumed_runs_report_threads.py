"""A run that is resumed with another number of threads warns that its bits may differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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


def test_the_number_is_that_of_the_run(command: Command, set_threads: Callable[[int], None]) -> None:
    """A run keeps its ``--threads``, and the process gets back its own number."""
    set_threads(1)
    command.works("--threads=2")
    assert torch.get_num_threads() == 1
    assert resumed(command, "--steps=3") == ""
    said = resumed(command, "--steps=4", "--threads=1")
    assert "torch has 1 threads, and the run had 2: " in said
    assert "give --threads 2 to keep them" in said
    assert resumed(command, "--steps=5") == ""
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("subcommand", ["finetune", "compare", "replay", "bench"])
def test_every_command_that_computes_takes_a_number(
    subcommand: str, capsys: pytest.CaptureFixture[str]
) -> None:
    positional = ["demo", "none", "--out=none"] if subcommand == "replay" else []
    assert main([subcommand, *positional, "--threads=0"]) == 2
    assert "--threads: must be " in capsys.readouterr().err
