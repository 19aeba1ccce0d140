"""``torchrun -m zoext replay`` writes the bytes of one process; each rank replays a part of every weight."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.launched_commands import Launcher
from support.tiny_models import labelled, tiny_bert

RUNS = {
    "residual": "--optimizer=adamezo --dtype=bfloat16 --precision=residual --weight-decay=0.1",
    "bases": "--optimizer=agzo --record-frames",
}


@pytest.fixture(scope="module")
def folder(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Among the parameters are classifiers with two rows, of which one of three ranks has none."""
    folder = tmp_path_factory.mktemp("replays")
    tiny_bert(folder / "model")
    labelled(folder / "words.jsonl")
    for name, options in RUNS.items():
        inputs = ["--model=model", "--data=words.jsonl", "--steps=4", "--lr=1e-3", "--device=cpu", "--quiet"]
        command = ["finetune", *inputs, *options.split(), f"--out={name}"]
        assert launcher.run(command, folder, ranks=1).failed == {}
    return folder


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("run", RUNS)
def test_the_model_of_the_run(launcher: Launcher, folder: Path, run: str) -> None:
    command = ["replay", "model", f"{run}/trajectory.jsonl", f"--out={run}-replayed", "--device=cpu"]
    ended = launcher.run(command, folder, ranks=3)
    assert (ended.failed, ended.out, ended.err.count("done")) == ({}, "", 1)
    found = files(folder / f"{run}-replayed")
    del found["replay.json"]
    assert found == files(folder / run / "model")


def test_the_difference_of_one_process(launcher: Launcher, folder: Path) -> None:
    command = ["replay", "model", "residual/trajectory.jsonl", "--to-step=3", "--difference", "--device=cpu"]
    for ranks in (1, 3):
        out = f"--out=difference-{ranks}"
        assert launcher.run([*command, out, "--quiet"], folder, ranks=ranks).failed == {}
    assert files(folder / "difference-3") == files(folder / "difference-1")


def test_an_error_is_printed_once(launcher: Launcher, folder: Path) -> None:
    """The model is not the one that the run began with."""
    command = ["replay", "bases/model", "bases/trajectory.jsonl", "--out=none", "--device=cpu"]
    ended = launcher.run(command, folder)
    assert set(ended.failed.values()) == {2}
    assert len(ended.said) == 1
    assert "weights mismatch" in ended.said[0]
    assert not (folder / "none").exists()
