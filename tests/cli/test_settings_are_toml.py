"""A run writes its settings as TOML, and ``--config`` starts a run like it; options go before the file."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from support.finetune_command import Command, prepare
from zoext.cli import _config, main
from zoext.cli._commands import compare, finetune
from zoext.cli._comparison.settings import ComparisonSettings
from zoext.cli._settings import Settings

ODD = Settings(
    model='a "model"',
    template='Say "{text}"\n\\ \t{{é}} \x7f\u2028',
    label_words={"0": " no, not = it", 'a "b"': "yes", "\U0001f600": "\U0001f60e"},
    lr=3e-7,
    options={"rank": "4"},
    record_frames=True,
    log=("csv", "wandb"),
)


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "run.json").read_text())["settings"]
    return settings


@pytest.mark.parametrize(
    ("settings", "module"),
    [(ODD, finetune), (Settings(), finetune), (ComparisonSettings(lrs={"mezo": 1e-5}), compare)],
)
def test_all_settings_are_read_back(tmp_path: Path, settings: Any, module: Any) -> None:
    path = tmp_path / "config.toml"
    path.write_text(_config.text_of(settings), encoding="utf-8")
    assert type(settings)(**_config.read(path, module.add_arguments)) == settings


def test_a_run_starts_another_one_like_it(command: Command) -> None:
    command.works("--steps=3", "--optimizer=lozo", "--options=rank=3", "--seed=5", "--weight-decay=0.1")
    again = command.folder / "again"
    assert main(["finetune", f"--config={command.out / 'config.toml'}", f"--out={again}", "--quiet"]) == 0
    assert settings_of(again) == settings_of(command.out)
    model = Path("model") / "model.safetensors"
    assert (again / model).read_bytes() == (command.out / model).read_bytes()
    assert (again / "config.toml").read_bytes() == (command.out / "config.toml").read_bytes()


def test_options_go_before_the_file(command: Command) -> None:
    command.works("--seed=5")
    again = command.folder / "again"
    file = f"--config={command.out / 'config.toml'}"
    assert main(["finetune", file, "--seed=6", f"--out={again}", "--quiet"]) == 0
    assert settings_of(again) == settings_of(command.out) | {"seed": 6}
    assert tomllib.loads((again / "config.toml").read_text())["seed"] == 6


def test_a_file_written_by_hand(command: Command) -> None:
    file = command.folder / "mine.toml"
    text = 'batch_size = 7\noptimizer = "lozo"\noptions = { rank = 3 }\nrecord-frames = false\n'
    file.write_text(text, encoding="utf-8-sig")  # as some editors write it
    command.works(f"--config={file}")
    found = settings_of(command.out)
    assert (found["batch_size"], found["optimizer"], found["options"]) == (7, "lozo", {"rank": "3"})


def test_a_resumed_run_writes_its_new_settings(command: Command) -> None:
    command.works("--steps=2")
    command.works("--resume", "--steps=3")
    assert tomllib.loads((command.out / "config.toml").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr = ", "not TOML: "),
        ("rate = 1", "rate: no such setting; --help lists the options"),
        ("step = 5", "step: no such setting"),
        ('out = "here"', "out: no such setting"),
        ("lr = -1", "must be finite and > 0"),
        ('task = "sst3"', "'sst3'"),
        ("[options]\n[options.rank]\nof = 1", "option rank must be of the form of"),
    ],
)
def test_a_file_that_cannot_be_used(command: Command, text: str, expected: str) -> None:
    file = command.folder / "mine.toml"
    file.write_text(text + "\n")
    assert expected in command.is_refused(f"--config={file}", "--optimizer=lozo")


def test_a_file_that_is_not_there(command: Command) -> None:
    assert "cannot be read: " in command.is_refused("--config=none.toml")
