"""A run that was killed before its first checkpoint continues from its trajectory, to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.finetune_command import Command, prepare
from zoext.cli import main
from zoext.cli._runs.records import read_metrics

OPTIONS = ("--steps=9", "--eval-every=4", "--batch-size=5", "--lr=3e-3", "--schedule=cosine")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def killed(command: Command, *options: str, metrics: int, steps: int) -> None:
    """Leaves what a process leaves that is killed before its first checkpoint, with so many lines."""
    command.works(*OPTIONS, *options)
    for folder in ("checkpoints", "model"):
        shutil.rmtree(command.out / folder)
    for name, lines in (("metrics.jsonl", metrics), ("trajectory.jsonl", 1 + steps)):
        path = command.out / name
        whole = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(whole[:lines]) + whole[lines][:10])


def assert_as_in_peace(command: Command, *options: str) -> None:
    whole = command.folder / "whole"
    command.works(*OPTIONS, *options, f"--out={whole}")
    for file in ("trajectory.jsonl", "model/model.safetensors"):
        assert (command.out / file).read_bytes() == (whole / file).read_bytes(), file
    metrics = [read_metrics(out / "metrics.jsonl") for out in (command.out, whole)]
    for record in metrics[0] + metrics[1]:
        record.pop("seconds", None)
    assert metrics[0] == metrics[1]


def resumed(command: Command, *more: str) -> tuple[str, str]:
    arguments = [part for part in command.arguments("--resume", *more) if part != "--quiet"]
    assert main(arguments) == 0
    said = command.capsys.readouterr()
    return said.out, said.err


# Metrics begin with an evaluation, and have another one after the fourth step.
@pytest.mark.parametrize(("metrics", "steps", "continues"), [(7, 7, 5), (8, 4, 4), (5, 6, 4), (6, 8, 4)])
@pytest.mark.parametrize("options", ["", "--optimizer=adamezo --dtype=bfloat16 --precision=residual"])
def test_it_continues_from_the_last_step_in_both_files(
    command: Command, metrics: int, steps: int, continues: int, options: str
) -> None:
    killed(command, *options.split(), metrics=metrics, steps=steps)
    told, warned = resumed(command)
    assert f"resumed from step {continues} (replayed from the trajectory, without a checkpoint)" in told
    assert "warning" not in warned
    assert not (command.out / "corrupted").exists()
    assert_as_in_peace(command, *options.split())


def test_it_replays_the_bases_of_agzo(command: Command) -> None:
    options = ("--optimizer=agzo", "--record-frames")
    killed(command, *options, metrics=7, steps=6)
    assert "resumed from step 5 (" in resumed(command)[0]
    assert_as_in_peace(command, *options)


@pytest.mark.parametrize("options", [["--probe=inplace"], ["--optimizer=agzo"]])
def test_it_starts_again_where_the_trajectory_cannot_be_replayed(
    command: Command, options: list[str]
) -> None:
    killed(command, *options, metrics=7, steps=7)
    told, warned = resumed(command)
    assert "resumed from" not in told
    assert "contains no checkpoint; the run starts again from its first step" in warned
    assert_as_in_peace(command, *options)


def test_a_checkpoint_is_named(command: Command) -> None:
    command.works(*OPTIONS)
    assert "resumed from step 9 (a checkpoint)" in resumed(command)[0]
