"""A run that diverged, rose or hardly moved says so by a stated criterion, and names the next lr."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from support.finetune_command import Command, prepare
from zoext.cli import main
from zoext.cli._problem.evaluation import Estimated, Evaluation
from zoext.cli._runs import outcome
from zoext.cli._runs.records import Record, read_metrics
from zoext.cli._settings import Settings


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def evaluation(loss: float, change: float | None = None, error: float = 0.01) -> Record:
    record: Record = {"step": 0, "valid_loss": loss, "valid_loss_error": 0.1}
    return record if change is None else record | {"change": change, "change_error": error}


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (evaluation(0.69, -0.011), None),
        (
            evaluation(0.695, -0.009),
            "hardly moved: the held-out loss changed by -0.0090 ± 0.0100; try --lr 3e-06",
        ),
        (
            evaluation(0.705, 0.009),
            "hardly moved: the held-out loss changed by 0.0090 ± 0.0100; try --lr 3e-06",
        ),
        (
            evaluation(0.72, 0.02),
            "the held-out loss rose by 0.0200 ± 0.0100; try --lr 3.3e-07, or --keep best",
        ),
        (evaluation(1.39, 0.69), "rose by"),
        (evaluation(1.41, 0.71), "diverged: held-out loss 0.7000 -> 1.4100; try --lr 3.3e-07"),
        (evaluation(math.nan, math.nan), "diverged: held-out loss 0.7000 -> nan; try --lr 3.3e-07"),
        (evaluation(0.7, 0.0, math.nan), None),  # a single example tells nothing
        (evaluation(0.60), "hardly moved"),  # without pairs, the error is .14
        (evaluation(0.55), None),
    ],
)
def test_the_criterion(last: Record, said: str | None) -> None:
    found = outcome.advice(evaluation(0.7), last, Settings(lr=1e-6))
    assert found is None if said is None else found is not None and said in found


def test_the_error_is_that_of_the_paired_difference(tmp_path: Path) -> None:
    """Examples of one prediction each: the error of the mean of the differences."""
    before, after = torch.tensor([0.1, 0.9, 0.5, 2.0]), torch.tensor([0.2, 0.7, 0.5, 1.7])
    results = [
        Evaluation(Estimated(0, 0), None, torch.stack([losses.double(), torch.ones(4).double()]))
        for losses in (before, after)
    ]
    path = tmp_path / "first.json"
    outcome.write_first(path, results[0])
    found = outcome.change(path, results[1])
    differences = (after - before).double()
    assert found["change"] == pytest.approx(differences.mean().item())
    assert found["change_error"] == pytest.approx(differences.std().item() / 2)
    path.write_text("[[0.1", encoding="utf-8")
    assert outcome.change(path, results[1]) == {}


def said_by(command: Command, *options: str) -> str:
    arguments = [part for part in command.arguments(*options) if part != "--quiet"]
    assert main(arguments) == 0
    return command.capsys.readouterr().out


def test_a_run_that_hardly_moved_names_a_larger_lr(command: Command) -> None:
    said = said_by(command, "--lr=1e-9", "--steps=4")
    assert "the run hardly moved: the held-out loss changed by " in said
    assert "; try --lr 3e-09, or more --steps" in said


def test_the_end_of_a_good_run_shows_commands_that_work(command: Command) -> None:
    said = said_by(command, "--lr=0.01", "--steps=40", "--seed=2")
    assert "try --lr" not in said
    shown = re.findall(r": (zoext .*)", said)
    assert [line.split()[1] for line in shown] == ["finetune", "replay"]
    for line in shown:
        assert main([*line.split()[1:], "--quiet"]) == 0


def test_divergence_in_the_middle_names_its_step_and_options_that_exist(command: Command) -> None:
    assert main(command.arguments("--lr=1e30", "--steps=9")) == 2
    said = command.capsys.readouterr().err
    found = re.fullmatch(
        r"zoext: error: step (\d+): .*; try --lr (\S+) \(it was 1e\+30\), with --overwrite\n", said
    )
    assert found is not None, said
    assert 2 <= int(found[1]) <= 4
    assert float(found[2]) == pytest.approx(1e30 / 3, rel=0.02)
    assert "nonfinite" not in said
    command.works("--lr=1e-3", "--overwrite")


def test_classifiers_have_no_perplexity(command: Command) -> None:
    command.works()
    assert not any("valid_perplexity" in record for record in read_metrics(command.out / "metrics.jsonl"))


def test_perplexity() -> None:
    assert outcome.perplexity(math.log(5)) == pytest.approx(5)
    assert outcome.perplexity(1e4) == math.inf
