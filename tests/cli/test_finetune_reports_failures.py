"""Corrupted files and errors of the system end with exit code 2 and one line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support import curves
from support.finetune_command import Command, files_of_at_most, prepare
from support.tiny_models import tiny_deberta
from zoext.cli import main
from zoext.cli._runs.training import Training


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_is_cut_short(command: Command, name: str) -> None:
    file = command.folder / "model" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    error = command.is_refused()
    assert f"model {command.folder / 'model'}: cannot be loaded: " in error


def test_a_folder_that_cannot_be_made(command: Command) -> None:
    (command.folder / "file").write_text("mine", encoding="utf-8")
    error = command.is_refused("--out", str(command.folder / "file" / "run"))
    assert f"{command.folder / 'file' / 'run'}: Not a directory" in error


@pytest.mark.parametrize(
    ("size", "name", "options"),
    [
        (100, "run.json", ["--steps=20"]),
        (1_600, "trajectory.jsonl", ["--steps=20"]),
        (9_000, "trajectory.jsonl", ["--steps=20", "--checkpoint-every=5", "--checkpoint=trajectory"]),
        (9_000, "trajectory.jsonl", ["--steps=20"]),
        (12_000, "trajectory.frames", ["--steps=20", "--optimizer=agzo", "--record-frames"]),
        (15_000, "checkpoints/step-00000020", ["--steps=20"]),
        (45_000, "metrics.jsonl", ["--steps=180", "--eval-every=1", "--checkpoint=trajectory"]),
        (50_000, "curve.png", ["--steps=20"]),
    ],
)
def test_a_full_disk(
    command: Command, size: int, name: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "curve.png":
        curves.drawn(monkeypatch)
    with files_of_at_most(size):
        assert main(command.arguments(*options)) == 2
    said = command.capsys.readouterr()
    assert said.err.startswith(f"zoext: error: {command.out / name}")
    assert said.err.count("\n") == 1
    assert "too large" in said.err.lower()
    if name.startswith(("checkpoints", "trajectory")):
        assert said.err.endswith(f"; fix this, then zoext finetune --out {command.out} --resume\n")
    assert not list(command.out.rglob(".*"))
    # The files are intact: with space on the disk, the run continues to the same bits.
    if name != "run.json":
        command.works("--resume")
        whole = command.folder / "whole"
        command.works(*options, f"--out={whole}")
        for file in ("model/model.safetensors", "trajectory.jsonl"):
            assert (command.out / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("replaced", "was moved, removed or replaced during the recording"),
        ("written", "another program writes"),
    ],
)
def test_a_trajectory_that_somebody_else_changes(
    command: Command, monkeypatch: pytest.MonkeyPatch, change: str, reason: str
) -> None:
    """The error has the reason of the recorder and a remedy in terms of the command line."""
    path, one_step = command.out / "trajectory.jsonl", Training._one_step

    def steps(self: Training) -> object:
        if self.step == 2 and change == "replaced":
            path.rename(command.folder / "aside")
        elif self.step == 2:
            with path.open("a") as file:
                file.write("graffiti")
        return one_step(self)

    monkeypatch.setattr(Training, "_one_step", steps)
    assert main(command.arguments("--steps=4", "--checkpoint-every=9")) == 2
    said = command.capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"zoext: error: {path}: {reason}")
    assert said.endswith(f"; fix this, then zoext finetune --out {command.out} --resume")
    assert "close()" not in said


def test_a_file_in_place_of_the_model(command: Command) -> None:
    command.works()
    shutil.rmtree(command.out / "model")
    (command.out / "model").write_text("in the way", encoding="utf-8")
    assert main(command.arguments("--resume")) == 2
    assert f"{command.out / 'model'}: File exists" in command.capsys.readouterr().err
    assert (command.out / "model").read_text(encoding="utf-8") == "in the way"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adamw"),
        ("dtype", "int8"),
        ("lr", "fast"),
        ("lr", None),
        ("lr", -1.0),
        ("steps", 2.5),
        ("steps", [2]),
        ("steps", True),
        ("model", 3),
        ("seed", 2**64),
    ],
)
def test_settings_that_no_run_wrote(command: Command, field: str, value: object) -> None:
    command.works()
    record = json.loads((command.out / "run.json").read_text(encoding="utf-8"))
    record["settings"][field] = value
    (command.out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    error = command.is_refused("--resume")
    assert f"{command.out / 'run.json'}: corrupted" in error
    assert field in error
    assert "start again with --overwrite" in error
    command.works("--overwrite")


@pytest.mark.parametrize(("field", "what"), [("precision", "lacks"), ("colour", "has")])
def test_settings_of_another_version(command: Command, field: str, what: str) -> None:
    command.works()
    record = json.loads((command.out / "run.json").read_text(encoding="utf-8"))
    if record["settings"].pop(field, None) is None:
        record["settings"][field] = "red"
    (command.out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    error = command.is_refused("--resume")
    assert (
        f"{command.out / 'run.json'}: was written by another version of zoext, it {what} {field}; " in error
    )
    assert "start again with --overwrite" in error


@pytest.mark.parametrize(("field", "value"), [("lr", 0.002), ("seed", 7), ("validation_fraction", 0.2)])
def test_settings_that_were_changed(command: Command, field: str, value: object) -> None:
    command.works()
    record = json.loads((command.out / "run.json").read_text(encoding="utf-8"))
    record["settings"][field] = value
    (command.out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    error = command.is_refused("--resume", "--steps=3")
    assert f"{command.out / 'run.json'}: was edited, and the run had other settings" in error


def test_model_and_data_may_be_moved(command: Command) -> None:
    command.works()
    record = json.loads((command.out / "run.json").read_text(encoding="utf-8"))
    for field, name in (("model", "model"), ("data", "words.jsonl")):
        (command.folder / name).rename(command.folder / f"moved-{name}")
        record["settings"][field] = str(command.folder / f"moved-{name}")
    (command.out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    command.works("--resume", "--steps=3")


@pytest.mark.parametrize("text", ["[]", "3", '{"settings": 3, "data": ""}', '{"data": ""}', "\x00"])
def test_a_run_without_settings(command: Command, text: str) -> None:
    command.works()
    (command.out / "run.json").write_text(text, encoding="utf-8")
    assert f"{command.out / 'run.json'}: corrupted" in command.is_refused("--resume")


def test_a_model_that_reads_weights_outside_their_modules(command: Command) -> None:
    """DeBERTa reads the weight of an embedding that it never calls."""
    tiny_deberta(command.folder / "model")
    command.works("--probe", "streamed")
