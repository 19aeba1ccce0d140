"""Checkpoints are refused if their text is not what was written, or if the noise field has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.finetune_command import Command, prepare
from zoext.cli import _restoring
from zoext.trajectory._format import header


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def state_of(command: Command, step: int) -> Path:
    return command.out / "checkpoints" / f"step-{step:08d}" / "state.json"


def replaced(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


def without(name: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        record = json.loads(text)
        del record[name]
        return json.dumps(record)

    return edit


EDITS = {
    "lr": replaced("0.001", "0.003"),
    "step of the run": replaced('"step": 2', '"step": 1'),
    "forwards": replaced('"forwards": 4', '"forwards": 5'),
    "infinite": replaced('"step": 2', '"step": Infinity'),
    "threads": replaced('"threads": ', '"threads": 1'),
    "noise field": replaced('"noise_field": ', '"noise_field": 1'),
    "name of a field": replaced('"forwards"', '"forward"'),
    "optimizer": lambda text: json.dumps({**json.loads(text), "optimizer": 3}),
    "no optimizer": without("optimizer"),
    "no checksum": without("checksum"),
    "another checksum": lambda text: json.dumps({**json.loads(text), "checksum": "0" * 64}),
    "a list": lambda text: f"[{text}]",
    "deep": lambda text: "[" * 100_000,
    "long": lambda text: "9" * 5_000,
}


@pytest.mark.parametrize("edit", EDITS)
def test_each_character_of_the_text_counts(command: Command, edit: str) -> None:
    command.works("--checkpoint-every=1")
    state = state_of(command, 2)
    state.write_text(EDITS[edit](state.read_text(encoding="utf-8")), encoding="utf-8")
    error = command.is_refused("--resume", "--steps=3")
    assert f"{state}: corrupted, " in error
    assert f"remove {state.parent} to resume from step-00000001" in error


@pytest.mark.parametrize("kind", ["weights", "trajectory"])
def test_the_only_one(command: Command, kind: str) -> None:
    command.works(f"--checkpoint={kind}")
    state = state_of(command, 2)
    state.write_text("{", encoding="utf-8")
    error = command.is_refused("--resume", "--steps=3")
    assert f"remove {state.parent} to start again and keep the trajectory for zoext replay, or start" in error


@pytest.mark.parametrize("kind", ["weights", "trajectory"])
def test_other_directions(command: Command, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    command.works(f"--checkpoint={kind}")
    for module in (header, _restoring):
        monkeypatch.setattr(module, "NOISE_FIELD", header.NOISE_FIELD + 1)
    error = command.is_refused("--resume", "--steps=3")
    assert f"{state_of(command, 2)}: noise_field is " in error
    assert "resume with the zoext that the run began with" in error
    assert "--overwrite" not in error


@pytest.mark.parametrize("what", ["VERSION", "NOISE_FIELD"])
@pytest.mark.parametrize("kind", ["weights", "trajectory"])
def test_a_trajectory_of_another_version_is_not_corrupted(
    command: Command, monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    command.works(f"--checkpoint={kind}")
    monkeypatch.setattr(header, what, getattr(header, what) + 1)
    error = command.is_refused("--resume", "--steps=3")
    assert f"{command.out / 'trajectory.jsonl'}: line 1: {what.lower()} is " in error
    assert "install the zoext that wrote it" in error
    assert "--overwrite" not in error


def test_what_is_written_is_read_back(command: Command) -> None:
    """Rewriting the same content is accepted, so the edits above are what is refused."""
    command.works()
    state = state_of(command, 2)
    record: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    state.write_text(json.dumps(dict(reversed(record.items()))), encoding="utf-8")
    command.works("--resume", "--steps=3")
