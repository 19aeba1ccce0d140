"""``--lr auto`` chooses the lr of the lowest loss on training examples held out, and a resumed run has it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.finetune_command import Command, prepare
from zoext.cli import main
from zoext.cli._runs import lr_search
from zoext.cli._settings import Settings


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def losses_by(monkeypatch: pytest.MonkeyPatch, losses: Any) -> list[float]:
    """Replaces the short runs by a function of their lr; returns the list of what is tried."""
    tried: list[float] = []

    def loss_after(self: Any, lr: float) -> float:
        tried.append(lr / Settings.lr)
        return float(losses(lr / Settings.lr))

    monkeypatch.setattr(lr_search._Search, "loss_after", loss_after)
    return tried


def stored_lr(command: Command) -> float:
    return float(json.loads((command.out / "run.json").read_text(encoding="utf-8"))["settings"]["lr"])


@pytest.mark.parametrize(
    ("best", "more", "chosen"),
    [(1, [], 1), (3, [], 3), (9, [27], 9), (9999, [27, 81, 243, 729, 2187], 2187), (1 / 9, [1 / 27], 1 / 9)],
)
def test_the_grid_is_around_the_default_and_is_extended(
    command: Command, monkeypatch: pytest.MonkeyPatch, best: float, more: list[float], chosen: float
) -> None:
    tried = losses_by(monkeypatch, lambda factor: max(factor / best, best / factor))
    command.works("--lr=auto")
    assert tried == pytest.approx([1 / 9, 1 / 3, 1, 3, 9, *more])
    assert stored_lr(command) == pytest.approx(chosen * Settings.lr, rel=5e-3)


def test_every_run_diverges(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = losses_by(monkeypatch, lambda factor: float("inf"))
    error = command.is_refused("--lr=auto")
    assert "--lr auto: every run diverged, down to lr 4.57e-10; give --lr" in error
    assert len(tried) == 10


def test_a_table_is_printed_and_the_run_is_that_of_the_chosen_lr(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_search, "_STEPS", (2, 2))
    options = ("--optimizer=lozo", "--steps=3", "--batch-size=5")
    arguments = [part for part in command.arguments("--lr=auto", *options) if part != "--quiet"]
    assert main(arguments) == 0
    said = command.capsys.readouterr().out
    rows = re.findall(r"^ +(\S+)  (\d\.\d{4}|diverged)$", said, re.MULTILINE)
    assert len(rows) >= 5
    best = min(rows, key=lambda row: float("inf") if row[1] == "diverged" else float(row[1]))
    (chosen,) = re.findall(r"^chosen: --lr (\S+)", said, re.MULTILINE)
    assert dict(rows)[best[0]] == dict(rows).get(chosen, best[1])
    # The sweep leaves the weights as they were.
    whole = command.folder / "whole"
    command.works(f"--lr={chosen}", *options, f"--out={whole}")
    for file in ("model/model.safetensors", "trajectory.jsonl"):
        assert (command.out / file).read_bytes() == (whole / file).read_bytes()


def test_a_resumed_run_needs_no_sweep(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = losses_by(monkeypatch, lambda factor: factor)
    command.works("--lr=auto")
    lr, before = stored_lr(command), len(tried)
    command.works("--resume", "--lr=auto", "--steps=3")
    command.works("--resume", "--steps=4")
    assert len(tried) == before
    assert stored_lr(command) == lr


def test_held_out_examples_take_no_part(command: Command) -> None:
    from zoext.cli._problem import problem

    settings = Settings(model=str(command.folder / "model"), data=str(command.folder / "words.jsonl"))
    loaded = problem.load(settings)
    held_out, trained = lr_search.split(loaded.train)
    assert sorted(map(repr, [*held_out, *trained])) == sorted(map(repr, loaded.train))
    texts = [{example.tokens for example in part} for part in (held_out, trained)]
    assert texts[0]
    assert not texts[0] & texts[1]


def test_too_few_examples(command: Command) -> None:
    with pytest.raises(lr_search.UserError, match="at least two different"):
        lr_search.split([])


@pytest.mark.parametrize("value", ["automatic", "0", "-1"])
def test_bad_values_are_refused(command: Command, value: str) -> None:
    assert "--lr" in command.is_refused(f"--lr={value}")
