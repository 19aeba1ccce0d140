"""Bad input ends with exit code 2 and one line that names the remedy, before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support.compare_command import CompareCommand, prepare
from support.tiny_models import labelled, tiny_bert
from zoext.cli import main


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CompareCommand:
    return prepare(tmp_path, capsys, monkeypatch)


def one_run(command: CompareCommand) -> None:
    command.works("--lr-factors", "1", "--seeds", "1")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--optimizers", "mezo,adamw", "names out of mezo, one-sided, signs, once each, not mezo,adamw"),
        ("--optimizers", "mezo,mezo", "once each"),
        ("--optimizers", "", "names out of mezo"),
        ("--forwards", "0", "must be an integer of at least 1"),
        ("--forwards", "1", "--forwards 1: a step of mezo takes 2; give at least as many"),
        ("--sweep-forwards", "1", "--sweep-forwards 1: a step of mezo takes 2"),
        ("--sweep-forwards", "13", "more than the 12 of --forwards"),
        ("--seeds", "0", "must be an integer of at least 1"),
        ("--sweep-seeds", "some", "must be an integer of at least 1, not some"),
        ("--eval-every", "0", "must be an integer of at least 1"),
        ("--lr", "nan", "must be finite and > 0"),
        ("--lr-factors", "1,0", "must be finite and > 0, not 0"),
        ("--lr-factors", "1,,2", "must be finite and > 0"),
        ("--lrs", "mezo", "must be finite and > 0"),
        ("--lrs", "adamw=1e-3", "NAME=X,... with names out of mezo, one-sided, signs"),
        ("--lrs", "mezo=-1", "must be finite and > 0, not -1"),
        ("--mu", "0", "must be finite and > 0"),
        ("--device", "toaster", "--device toaster: unknown; give cpu"),
        ("--trainable", "lora", "matches no parameter"),
        ("--model", "./no-such-folder", "model ./no-such-folder: no such folder; give"),
        ("--data", "no-such-file.csv", "no-such-file.csv: no such file"),
        ("--validation-fraction", "0.05", "only 2 distinct held-out texts.*--validation-fraction"),
        ("--steps", "3", "unrecognized arguments"),
    ],
)
def test_an_argument_out_of_range(command: CompareCommand, option: str, value: str, expected: str) -> None:
    assert re.search(expected, command.is_refused(f"{option}={value}"))
    assert not command.out.exists()


def test_a_step_of_another_optimizer_that_is_too_long(command: CompareCommand) -> None:
    error = command.is_refused("--optimizers", "mezo,signs", "--forwards", "3")
    assert "a step of signs takes 4" in error


def test_a_model_whose_loss_is_not_finite(command: CompareCommand) -> None:
    from safetensors.torch import load_file, save_file

    path = command.folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"][0] = float("inf")
    save_file(tensors, path, {"format": "pt"})
    assert "not finite before the first step" in command.is_refused()


def test_a_folder_that_holds_a_comparison(command: CompareCommand) -> None:
    one_run(command)
    assert "give --resume, --overwrite or another folder" in command.is_refused()
    command.works("--overwrite", "--lr-factors", "1", "--seeds", "3")
    note = json.loads((command.out / "comparison.json").read_text(encoding="utf-8"))
    assert note["settings"]["seeds"] == 3


@pytest.mark.parametrize("name", ["runs.jsonl", "table.md", "curves.png"])
def test_files_that_no_comparison_wrote(command: CompareCommand, name: str) -> None:
    command.out.mkdir()
    (command.out / name).write_text("mine", encoding="utf-8")
    assert "move it away or give another folder" in command.is_refused("--overwrite")


def test_resume_without_a_comparison(command: CompareCommand) -> None:
    assert "holds no run to resume" in command.is_refused("--resume")


def test_resume_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--resume"]) == 2
    assert "--resume needs --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--mu", "0.1"), ("--batch-size", "4"), ("--eval-every", "2")])
def test_resume_with_what_changes_a_run(command: CompareCommand, option: str, value: str) -> None:
    one_run(command)
    error = command.is_refused("--resume", option, value)
    assert f"{option} {value}: the run in {command.out} has" in error


def test_resume_with_other_data(command: CompareCommand) -> None:
    one_run(command)
    labelled(command.folder / "words.jsonl", examples=42)
    assert "model or data mismatch" in command.is_refused("--resume", "--seeds", "3")


def test_resume_with_other_weights(command: CompareCommand) -> None:
    one_run(command)
    tiny_bert(command.folder / "model", seed=4)
    assert "model or data mismatch" in command.is_refused("--resume", "--seeds", "3")


def test_resume_with_a_budget_that_is_too_small(command: CompareCommand) -> None:
    one_run(command)
    assert "a step of mezo takes 2" in command.is_refused("--resume", "--forwards", "1")


@pytest.mark.parametrize("name", ["comparison.json", "runs.jsonl"])
def test_resume_of_a_corrupted_comparison(command: CompareCommand, name: str) -> None:
    one_run(command)
    file = command.out / name
    file.write_bytes(file.read_bytes()[40:])
    error = command.is_refused("--resume")
    assert name in error
    assert "start again with --overwrite" in error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizers", "mezo"),
        ("optimizers", ["adamw"]),
        ("optimizers", []),
        ("lrs", {"mezo": "fast"}),
        ("lrs", ["mezo"]),
        ("lr_factors", [1, "x"]),
        ("forwards", 2.5),
        ("forwards", None),
        ("eval_every", "2"),
        ("seeds", True),
    ],
)
def test_settings_that_no_comparison_wrote(command: CompareCommand, field: str, value: object) -> None:
    one_run(command)
    note = json.loads((command.out / "comparison.json").read_text(encoding="utf-8"))
    note["settings"][field] = value
    (command.out / "comparison.json").write_text(json.dumps(note), encoding="utf-8")
    assert f"{command.out / 'comparison.json'}: corrupted" in command.is_refused("--resume")


@pytest.mark.parametrize(
    "line",
    [
        "[2]",
        '{"step": 2}',
        '{"record": "method", "method": "mezo"}',
        '{"record": "end", "method": "mezo", "lr": 1.0, "seed": 0, "budget": 2}',
        '{"record": "evaluation", "method": "mezo", "lr": 1.0, "seed": 0, "budget": 2, "step": 0}',
    ],
)
def test_records_that_no_comparison_wrote(command: CompareCommand, line: str) -> None:
    one_run(command)
    lines = (command.out / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    (command.out / "runs.jsonl").write_text("\n".join([lines[0], line, *lines[1:], ""]), encoding="utf-8")
    error = command.is_refused("--resume")
    assert f"{command.out / 'runs.jsonl'}: line 2 " in error
