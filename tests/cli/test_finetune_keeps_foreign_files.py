"""A run removes and replaces only files that a run wrote, and never the model or the data that it reads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.finetune_command import Command, prepare


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["metrics.jsonl", "curve.png", "checkpoints/mine.txt", "model/mine.txt"])
def test_files_that_no_run_wrote(command: Command, name: str, overwrite: list[str]) -> None:
    mine = command.out / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    error = command.is_refused(*overwrite)
    assert str(command.out / name.partition("/")[0]) in error
    assert "move it away or give another folder" in error


def test_a_link_that_no_run_made(command: Command) -> None:
    command.out.mkdir()
    (command.out / "model").symlink_to(command.folder / "not-yet-there")
    assert "move it away" in command.is_refused("--overwrite")
    assert (command.out / "model").is_symlink()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_model_beside_which_the_run_would_be(command: Command, overwrite: list[str]) -> None:
    error = command.is_refused("--out", str(command.folder), *overwrite)
    assert f"--model {command.folder / 'model'}: the run would replace" in error
    assert "give another --out" in error


@pytest.mark.parametrize("option", ["--model", "--data", "--valid-data"])
@pytest.mark.parametrize("place", ["model/input", "checkpoints/deep/input"])
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_inputs_inside_the_run(
    command: Command, option: str, place: str, linked: bool, overwrite: list[str]
) -> None:
    (command.out / "run.json").parent.mkdir()
    (command.out / "run.json").write_text("{}", encoding="utf-8")
    given = command.out / (place + ("" if option == "--model" else ".jsonl"))
    given.parent.mkdir(parents=True)
    if option == "--model":
        shutil.copytree(command.folder / "model", given)
    else:
        shutil.copy(command.folder / "words.jsonl", given)
    if linked:
        link = command.folder / f"link{given.suffix}"
        link.symlink_to(given)
        given = link
    error = command.is_refused(option, str(given), *overwrite)
    assert f"{option} {given}: the run would replace {command.out / place.partition('/')[0]}" in error


@pytest.mark.parametrize("option", ["--data", "--valid-data"])
def test_data_that_is_a_file_of_the_run(command: Command, option: str) -> None:
    command.works()
    shutil.copy(command.folder / "words.jsonl", command.out / "metrics.jsonl")
    assert "the run would replace" in command.is_refused(
        option, str(command.out / "metrics.jsonl"), "--overwrite"
    )


def test_files_beside_those_of_a_run(command: Command) -> None:
    command.works()
    names = ["notes.txt", ".draft.tmp", ".draft.7.tmp"]
    for name in names:
        (command.out / name).write_text("mine", encoding="utf-8")
    command.works("--resume", "--steps", "4")
    command.works("--overwrite", "--seed", "4")
    assert [(command.out / name).read_text(encoding="utf-8") for name in names] == ["mine"] * 3


def test_a_new_run_beside_its_data(command: Command) -> None:
    before = command.snapshot()
    command.out.mkdir()
    shutil.copy(command.folder / "words.jsonl", command.out / "train.jsonl")
    command.works("--data", str(command.out))
    assert (command.out / "train.jsonl").read_bytes() == (command.folder / "words.jsonl").read_bytes()
    assert before.items() <= command.snapshot().items()


def test_a_linked_model_of_a_run_that_is_removed(command: Command) -> None:
    command.works()
    shutil.move(command.out / "model", command.folder / "kept")
    (command.out / "model").symlink_to(command.folder / "kept")
    command.works("--overwrite", "--seed", "4")
    assert not (command.out / "model").is_symlink()
    assert (command.folder / "kept" / "model.safetensors").is_file()


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--data=none.csv"]])
def test_a_lock_that_is_none(command: Command, more: list[str]) -> None:
    command.out.mkdir()
    lock = command.out / "run.lock"
    lock.write_text("mine", encoding="utf-8")
    assert f"{lock}: is not a lock of zoext, which is empty; move it away" in command.is_refused(*more)
