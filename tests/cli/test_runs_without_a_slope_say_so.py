"""A run whose probes all have equal losses says so once, with the options that mend it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from support.compare_command import CompareCommand
from support.finetune_command import Command, prepare
from support.tiny_models import labelled, tiny_bert
from zoext.cli import main
from zoext.cli._runs.slopes import SlopeWatch
from zoext.cli._settings import Settings


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


@pytest.mark.parametrize(("steps", "mu", "told"), [(23, "1e-12", 20), (7, "1e-12", 7), (23, "1e-3", None)])
def test_steps_without_a_slope(command: Command, steps: int, mu: str, told: int | None) -> None:
    """The displacement is lost to rounding, so the losses of all probes are equal."""
    arguments = command.arguments(f"--steps={steps}", f"--mu={mu}", "--eval-every=5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the library says is for programs
        assert main([each for each in arguments if each != "--quiet"]) == 0
    said = command.capsys.readouterr()
    if told is None:
        assert "bit-identical" not in said.out + said.err
        return
    about = f"the losses of each of the last {told} steps were bit-identical, so there is no slope to follow"
    assert said.err.count(about) == 1
    assert f"warning: {about}: try a larger --mu than 1e-12 or a larger --batch-size" in said.err
    assert f"the losses of each of the last {steps} steps" in said.out
    assert "hardly moved" not in said.out


def test_only_steps_in_a_row_have_no_slope() -> None:
    watch = SlopeWatch(Settings(dtype="bfloat16"), 1000)
    assert watch.note([True] * 19) is None
    assert watch.note([False]) is None
    assert watch.note([True] * 12) is None
    found = watch.note([True] * 9)
    assert found is not None
    assert "the last 20 steps" in found
    assert "--mu than 0.001, --dtype float32 or" in found
    assert watch.note([True] * 30) is None  # once in a run


def test_comparisons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two forwards a step, so a run has 3 steps."""
    tiny_bert(tmp_path / "model")
    labelled(tmp_path / "words.jsonl")
    command = CompareCommand(tmp_path, capsys)
    options = ["--mu=1e-12", "--forwards=6", "--eval-every=2", "--seeds=1", "--lr-factors=1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(command.arguments(*options)) == 0
    said = capsys.readouterr().err
    assert "warning: mezo lr 0.003 seed 0: the losses of each of the last 3 steps were bit-identical" in said
