"""With ``--json``, a command prints one JSON object about its result, and nothing else."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import zoext
from support import compare_command, finetune_command
from support.compare_command import CompareCommand
from support.finetune_command import Command
from zoext.cli import main
from zoext.cli._problem.evaluation import Estimated
from zoext.cli._runs.records import read_metrics


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return finetune_command.prepare(tmp_path, capsys)


@pytest.fixture
def comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CompareCommand:
    return compare_command.prepare(tmp_path, capsys, monkeypatch)


def printed(command: Command, *options: str, code: int = 0) -> dict[str, Any]:
    """The object that a command line prints, which does not ask for quiet."""
    arguments = [each for each in command.arguments(*options, "--json") if each != "--quiet"]
    assert main(arguments) == code
    out, err = command.capsys.readouterr()
    assert out.count("\n") == 1
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


def test_numbers_that_are_not_finite_are_null(command: Command) -> None:
    """A single held-out example has no standard error, and NaN is not JSON."""
    single = command.folder / "single.jsonl"
    single.write_text('{"text": "the cat", "label": 1}\n', encoding="utf-8")
    found = printed(command, f"--valid-data={single}")
    assert [each["valid_loss_error"] for each in found["evaluations"]] == [None, None]
    assert str(Estimated(0.5, math.nan)) == "0.5000"


def test_finetune(command: Command) -> None:
    found = printed(command, "--steps=3", "--eval-every=2")
    evaluations = [each for each in read_metrics(command.out / "metrics.jsonl") if "valid_loss" in each]
    assert [each["step"] for each in evaluations] == [0, 2, 3]
    assert found.pop("remarks")
    assert found == {
        "out": str(command.out),
        "finished": True,
        "step": 3,
        "model": str(command.out / "model"),
        "model_step": 3,
        "trajectory": str(command.out / "trajectory.jsonl"),
        "evaluations": evaluations,
    }


def test_the_best_step(command: Command) -> None:
    """An lr that makes the loss worse."""
    found = printed(command, "--steps=3", "--eval-every=1", "--keep=best", "--lr=0.3")
    losses = {each["step"]: each["valid_loss"] for each in found["evaluations"]}
    assert found["model_step"] == min(losses, key=lambda step: losses[step]) < found["step"] == 3


def test_a_run_that_cannot_be_replayed(command: Command) -> None:
    assert printed(command, "--optimizer=agzo")["trajectory"] is None


def test_a_run_that_is_stopped(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 2)
    found = printed(command, "--steps=9", code=143)
    resume = f"zoext finetune --out {command.out} --resume"
    assert found == {"out": str(command.out), "finished": False, "step": 2, "resume": resume}


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Sends SIGTERM within step number ``steps`` of any run."""
    step, taken = zoext.MeZO.step, []

    def signalled(self: zoext.MeZO, *arguments: Any, **options: Any) -> torch.Tensor:
        taken.append(None)
        if len(taken) == steps:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments, **options)

    monkeypatch.setattr(zoext.MeZO, "step", signalled)


def test_compare(comparison: CompareCommand) -> None:
    found = printed(comparison, "--optimizers=mezo,signs", "--lr-factors=1,4")
    (rows, _) = comparison.tables()
    methods = found.pop("methods")
    files = {"table": "table.md", "curves": "curves.png", "runs": "runs.jsonl"}
    paths = {name: str(comparison.out / file) for name, file in files.items()}
    assert found == {"out": str(comparison.out), "finished": True, **paths}
    assert [method["optimizer"] for method in methods] == ["mezo", "signs"]
    for method, row in zip(methods, rows, strict=True):
        assert row["lr"] == f"{method['lr']:.3g}" + (" (edge)" if method["lr_at_edge"] else "")
        assert row["forwards per step"] == str(method["forwards_a_step"])
        assert (method["seeds"], method["diverged"], method["schedule"]) == (2, 0, "constant")
        for name, column in (("loss", "held-out loss"), ("accuracy", "accuracy")):
            first, *_, last = method["curves"][name]
            assert last["forwards"] == 12
            values = torch.tensor(last["values"], dtype=torch.float64)
            assert last["mean"] == pytest.approx(values.mean().item())
            shown = Estimated(values.mean().item(), values.std().item() / 2**0.5)
            assert row[column] == f"{first['mean']:.4f} → {shown}"


def test_a_comparison_that_is_stopped(comparison: CompareCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 5)
    found = printed(comparison, code=143)
    resume = f"zoext compare --out {comparison.out} --resume"
    assert found == {"out": str(comparison.out), "finished": False, "resume": resume}


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["zoext"] == zoext.__version__
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {name: value.strip() for name, _, value in (line.partition(":") for line in lines)} == found
