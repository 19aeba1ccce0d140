"""``--gradient-accumulation`` evaluates the same examples in pieces, to the same loss up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.finetune_command import Command, prepare
from support.tiny_models import FIXTURES
from zoext.cli import main
from zoext.cli._problem import problem, steps
from zoext.cli._runs.records import read_metrics
from zoext.cli._settings import Settings
from zoext.tasks import Classes


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


# 7 examples in pieces of 4 and 3, of 3, 3 and 1, and of 1.
@pytest.mark.parametrize("pieces", [2, 3, 7])
# AGZO joins the subspaces of the pieces, which is an approximation.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("mezo", 1e-4), ("mezo-greedy", 1e-4), ("agzo", 1e-2)])
def test_the_losses_of_a_run(command: Command, pieces: int, optimizer: str, tolerance: float) -> None:
    options = ("--steps=3", "--batch-size=7", "--lr=1e-4", f"--optimizer={optimizer}")
    whole = command.folder / "whole"
    command.works(*options, f"--out={whole}")
    command.works(*options, f"--gradient-accumulation={pieces}")
    assert losses(command.out) == pytest.approx(losses(whole), rel=tolerance)
    forwards = [read_metrics(out / "metrics.jsonl")[-1]["forwards"] for out in (command.out, whole)]
    assert forwards[0] == forwards[1]


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the small language model is not beside this checkout")
def test_pieces_are_weighted_by_their_predictions() -> None:
    """Texts have different lengths, so a mean of means would differ."""
    settings = Settings(
        model=str(FIXTURES / "stories260k"),
        data=str(FIXTURES / "fables_train.txt"),
        batch_size=7,
        gradient_accumulation=3,
    )
    loaded = problem.load(settings)
    device = torch.device("cpu")
    pieces = steps.batches(loaded, settings, 0, device)
    assert [len(piece["input_ids"]) for piece in pieces] == [3, 3, 1]
    with torch.no_grad():
        each = [loaded.objective.scores(loaded.model, piece) for piece in pieces]
        found = steps.scores_of(loaded, pieces).mean_loss()
    expected = sum(scores.loss.double().sum() for scores in each) / sum(s.predictions.sum() for s in each)
    assert found.item() == pytest.approx(float(expected), rel=1e-6)
    mean_of_means = sum(scores.mean_loss().item() for scores in each) / 3
    assert abs(mean_of_means - found.item()) > 1e-3


def test_a_forward_pass_sees_no_more_than_a_piece(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    scores = Classes.scores

    def watch(self, model, batch, copies=1):  # type: ignore[no-untyped-def]
        seen.add(len(batch["labels"]))
        return scores(self, model, batch, copies)

    monkeypatch.setattr(Classes, "scores", watch)
    command.works("--batch-size=8", "--gradient-accumulation=3")
    assert max(seen) == 3


def test_there_are_at_least_as_many_examples(command: Command) -> None:
    error = command.is_refused("--batch-size=4", "--gradient-accumulation=5")
    assert "--gradient-accumulation 5: more pieces than the 4 examples of --batch-size" in error


def test_it_does_not_change_when_a_run_is_resumed(command: Command) -> None:
    command.works("--gradient-accumulation=2")
    assert "--gradient-accumulation 4" in command.is_refused("--resume", "--gradient-accumulation=4")
    assert main([*command.arguments("--resume", "--steps=3")]) == 0
