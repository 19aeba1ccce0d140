"""Two commands never write the same run: the second is refused before it changes anything."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.compare_command import CompareCommand
from support.finetune_command import Command, prepare
from zoext.cli import main
from zoext.cli._commands import finetune
from zoext.cli._runs import claim
from zoext.cli._runs.claim import LOCK
from zoext.trajectory import OwnedFile


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    return prepare(tmp_path, capsys)


def while_loading(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Calls ``action`` once while the next run loads its model, like another process might."""
    load = finetune.load

    def loads(*arguments: Any) -> Any:
        monkeypatch.setattr(finetune, "load", load)
        action()
        return load(*arguments)

    monkeypatch.setattr(finetune, "load", loads)


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume", "--steps=9"]])
@pytest.mark.parametrize("there", [False, True])
def test_one_that_another_process_begins(
    command: Command, monkeypatch: pytest.MonkeyPatch, there: bool, more: list[str]
) -> None:
    if there:
        command.works("--seed=5")
    errors: list[str] = []
    while_loading(monkeypatch, lambda: errors.append(command.is_refused(*more)))
    command.works("--overwrite", "--seed=6")
    assert f"--out {command.out}: another process is writing this run" in errors[0]
    assert not (command.out / LOCK).exists()


def test_a_comparison_that_another_process_writes(command: Command) -> None:
    comparison = CompareCommand(command.folder, command.capsys)
    comparison.out.mkdir()
    with OwnedFile(comparison.out / LOCK, make=True):
        for more in ([], ["--overwrite"], ["--resume"]):
            assert "another process is writing this run" in comparison.is_refused(*more)


def test_runs_without_a_folder_get_one_each(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [part for part in command.arguments() if not part.startswith("--out")]
    while_loading(monkeypatch, lambda: main(arguments))
    assert main(arguments) == 0
    for number in (1, 2):
        assert (command.folder / "runs" / f"finetune-{number}" / "model" / "config.json").is_file()


def test_a_run_that_is_refused_leaves_no_folder(command: Command) -> None:
    arguments = [part for part in command.arguments("--data=none.csv") if not part.startswith("--out")]
    assert main(arguments) == 2
    assert not (command.folder / "runs").exists()
    command.capsys.readouterr()
    command.is_refused("--data=none.csv", f"--out={command.folder / 'a' / 'b'}")
    assert not (command.folder / "a").exists()
    command.out.mkdir()
    command.is_refused("--data=none.csv")
    assert list(command.out.iterdir()) == []


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_run_left_is_nobodys(
    command: Command, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    command.out.mkdir()
    (command.out / LOCK).touch()
    if not locks:
        without_locks(monkeypatch)
    command.works()
    assert not (command.out / LOCK).exists()


def test_without_locks_a_run_that_has_begun_stays(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)
    kept: list[dict[str, tuple[int, bytes]]] = []

    def another() -> None:
        command.works()
        kept.append(command.snapshot())

    while_loading(monkeypatch, another)
    assert main(command.arguments()) == 2
    assert "already holds a run" in command.capsys.readouterr().err
    assert command.snapshot() == kept[0]


@pytest.mark.parametrize("live", [LOCK, "trajectory.jsonl"])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_live_run_is_not_resumed(command: Command, checkpoints: bool, live: str) -> None:
    command.works()
    if not checkpoints:
        (command.out / "checkpoints").rename(command.folder / "checkpoints")
    with OwnedFile(command.out / live, make=True):
        assert "is writing" in command.is_refused("--resume", "--steps=4")


@pytest.mark.parametrize("live", [LOCK, "trajectory.jsonl"])
@pytest.mark.parametrize("corrupted", ["metrics.jsonl", "trajectory.jsonl"])
def test_what_a_live_run_writes_is_not_set_aside(command: Command, corrupted: str, live: str) -> None:
    command.works()
    with (command.out / corrupted).open("a") as file:
        file.write("corrupted\n")
    with OwnedFile(command.out / live, make=True):
        assert "is writing" in command.is_refused("--resume", "--steps=4")


def test_a_folder_without_room_for_a_lock(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(claim, "OwnedFile", refuses)
    error = command.is_refused()
    assert f"{command.out / LOCK}: Read-only file system; fix this or give another --out" in error


def test_a_folder_that_another_command_removes_just_now(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused command removes the folder that it created just before another command locks it."""
    made: list[Path] = []

    def makes(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not made:
            folder.rmdir()
        made.append(folder)

    monkeypatch.setattr(claim.atomic, "make_folder", makes)
    with claim.claimed(command.out, "finetune") as folder:
        assert (folder / LOCK).is_file()
    assert made == [command.out, command.out]
    assert not command.out.exists()
