"""lr and mu follow their schedules in metrics and trajectory, and to the bit when a run is resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from support.finetune_command import Command, prepare
from support.trajectory_files import records
from zoext.cli import main
from zoext.cli._runs.records import read_metrics
from zoext.cli._runs.training import Training
from zoext.cli._schedules import Schedule

LINEAR = [1 / 3, 2 / 3, 1, 1, 0.75, 0.5, 0.25]  # three steps of warm-up, then down to 0 after the last step


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def test_factors_are_those_of_the_formulas() -> None:
    assert [Schedule("constant", 7).factor(done) for done in range(7)] == [1] * 7
    linear = Schedule("linear", 7, warmup=3)
    assert [linear.factor(done) for done in range(7)] == pytest.approx(LINEAR)
    cosine = Schedule("cosine", 5, end=0.2)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * done / 5)) / 2 for done in range(5)]
    assert [cosine.factor(done) for done in range(5)] == pytest.approx(expected)


def test_a_step_of_several_forward_passes_counts_them() -> None:
    schedule = Schedule("linear", 40, warmup=8)
    assert [schedule.factor(done, 4) for done in (0, 4, 8, 24, 36)] == [0.5, 1, 1, 0.5, 0.125]


SCHEDULED = (
    *("--steps=7", "--lr=3e-3", "--schedule=linear", "--warmup=3", "--batch-size=5"),
    *("--mu=2e-3", "--mu-schedule=cosine", "--mu-end=0.25"),
)


def test_the_trajectory_and_the_metrics_have_lr_and_mu_of_every_step(command: Command) -> None:
    command.works(*SCHEDULED)
    expected_lr = [3e-3 * factor for factor in LINEAR]
    cosine = [(1 + math.cos(math.pi * done / 7)) / 2 for done in range(7)]
    expected_mu = [2e-3 * (0.25 + 0.75 * each) for each in cosine]
    taken = records(command.out / "trajectory.jsonl")[1:]
    assert [step["lr"][0] for step in taken] == pytest.approx(expected_lr)
    assert [step["mu"][0] for step in taken] == pytest.approx(expected_mu)
    metrics = [record for record in read_metrics(command.out / "metrics.jsonl") if "loss" in record]
    assert [record["lr"] for record in metrics] == [step["lr"][0] for step in taken]
    assert [record["mu"] for record in metrics] == [step["mu"][0] for step in taken]


@pytest.mark.parametrize("optimizer", ["mezo", "adamezo", "lozo", "mezo-gv", "mezo-greedy"])
@pytest.mark.parametrize("checkpoint", ["weights", "trajectory"])
def test_resumed_and_replayed_runs_have_the_same_bits(
    command: Command, monkeypatch: pytest.MonkeyPatch, optimizer: str, checkpoint: str
) -> None:
    options = (*SCHEDULED, f"--optimizer={optimizer}", f"--checkpoint={checkpoint}")
    command.works(*options, f"--out={command.folder / 'whole'}")
    one_step = Training._one_step

    def fails(self: Training) -> object:
        if self.step == 5:
            raise MemoryError
        return one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_one_step", fails)
        with pytest.raises(MemoryError):
            main(command.arguments(*options, "--checkpoint-every=2"))
    command.works("--resume")
    for file in ("trajectory.jsonl", "model/model.safetensors"):
        assert (command.out / file).read_bytes() == (command.folder / "whole" / file).read_bytes()
    again = command.folder / "again"
    inputs = [str(command.folder / "model"), str(command.out / "trajectory.jsonl")]
    assert main(["replay", *inputs, f"--out={again}", "--quiet"]) == 0
    replayed = (again / "model.safetensors").read_bytes()
    assert replayed == (command.out / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("option", ["--schedule=linear", "--mu-schedule=cosine"])
def test_a_schedule_that_has_begun_keeps_its_end(command: Command, option: str) -> None:
    command.works("--steps=4", option)
    error = command.is_refused("--resume", "--steps=6")
    name, _, shape = option.partition("=")
    assert f"--steps 6: {name} {shape} of the run in {command.out} ends at step 4; " in error
    assert f"--model {command.out / 'model'}" in error
    command.works("--resume", "--steps=4")


def test_a_warmup_leaves_the_end_open(command: Command) -> None:
    command.works("--steps=4", "--warmup=3")
    command.works("--resume", "--steps=6")
    command.works("--steps=6", "--warmup=3", f"--out={command.folder / 'whole'}")
    for file in ("trajectory.jsonl", "model/model.safetensors"):
        assert (command.out / file).read_bytes() == (command.folder / "whole" / file).read_bytes()


def test_a_warmup_is_shorter_than_the_run(command: Command) -> None:
    error = command.is_refused("--steps=3", "--warmup=3")
    assert "--warmup 3: must be less than --steps, which is 3" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [("--schedule", "step"), ("--warmup", "-1"), ("--lr-end", "1.5"), ("--mu-end", "0"), ("--mu-end", "1")],
)
def test_bad_values_are_refused(command: Command, option: str, value: str) -> None:
    assert option in command.is_refused(f"{option}={value}")


def test_settings_are_stored(command: Command) -> None:
    command.works(*SCHEDULED, "--lr-end=0.125")
    stored = json.loads((command.out / "run.json").read_text(encoding="utf-8"))["settings"]
    names = ("schedule", "warmup", "lr_end", "mu_schedule", "mu_end")
    assert [stored[name] for name in names] == ["linear", 3, 0.125, "cosine", 0.25]
