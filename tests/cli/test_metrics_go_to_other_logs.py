"""``--log`` writes the metrics as CSV, for TensorBoard and for W&B; a package that is missing is named."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

from support.finetune_command import Command, prepare
from zoext.cli import main
from zoext.cli._runs.records import read_metrics
from zoext.cli._runs.training import Training

OPTIONS = ("--steps=6", "--eval-every=3", "--checkpoint-every=2", "--batch-size=5")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fails_at(monkeypatch: pytest.MonkeyPatch, step: int, arguments: list[str]) -> None:
    """Runs until ``step`` steps are taken, and raises."""
    one_step = Training._one_step

    def fails(self: Training) -> object:
        if self.step == step:
            raise MemoryError
        return one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_one_step", fails)
        with pytest.raises(MemoryError):
            main(arguments)


def test_a_table_has_a_column_for_each_metric(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_at(monkeypatch, 5, command.arguments(*OPTIONS, "--log=csv"))
    command.works("--resume")
    metrics = read_metrics(command.out / "metrics.jsonl")
    found = [{name: value for name, value in row.items() if value} for row in rows(command.out)]
    assert found == [{name: str(value) for name, value in record.items()} for record in metrics]


def test_logs_are_chosen_anew_when_a_run_is_resumed(command: Command) -> None:
    command.works(*OPTIONS)
    assert not (command.out / "metrics.csv").exists()
    command.works("--resume", "--log=csv")
    assert len(rows(command.out)) == 9
    command.works("--log=", "--overwrite")
    assert not (command.out / "metrics.csv").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_shows_each_step_once(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fails_at(monkeypatch, 5, command.arguments(*OPTIONS, "--log=csv,tensorboard"))
    command.works("--resume")
    shown = EventAccumulator(str(command.out / "tensorboard"))
    shown.Reload()
    metrics = read_metrics(command.out / "metrics.jsonl")
    for name in ("loss", "lr", "valid_loss"):
        expected = [(record["step"], record[name]) for record in metrics if name in record]
        assert [(event.step, event.value) for event in shown.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in expected
        ]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_offline(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    command.works(*OPTIONS, "--log=wandb")
    assert list((command.out / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == name else find(each))
    error = command.is_refused(f"--log={name}")
    assert f"--log {name}: needs {name}, not installed here: pip install {name}" in error


def test_no_package_is_imported_unless_asked_for(command: Command) -> None:
    before = {"wandb", "tensorboard"} & sys.modules.keys()
    command.works(*OPTIONS, "--log=csv")
    assert {"wandb", "tensorboard"} & sys.modules.keys() == before


@pytest.mark.parametrize("value", ["json", "csv,csv"])
def test_unknown_logs_are_refused(command: Command, value: str) -> None:
    assert "must be names out of csv, tensorboard, wandb" in command.is_refused(f"--log={value}")
