"""``--keep best`` writes the model with the lowest held-out loss, and ``--patience`` stops early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.finetune_command import Command, prepare
from zoext.cli import main
from zoext.cli._runs.records import read_metrics
from zoext.cli._runs.training import Training

# The loss rises again after some steps, since lr is too large to converge.
OPTIONS = ("--steps=16", "--eval-every=2", "--lr=0.03", "--batch-size=4", "--checkpoint-every=5", "--seed=3")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def losses_of(out: Path) -> dict[int, float]:
    records = read_metrics(out / "metrics.jsonl")
    return {record["step"]: record["valid_loss"] for record in records if "valid_loss" in record}


def model_of(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def best_step(out: Path) -> int:
    losses = losses_of(out)
    return min(losses, key=lambda step: losses[step])


def said_by(command: Command, *options: str) -> str:
    arguments = [part for part in command.arguments(*options) if part != "--quiet"]
    assert main(arguments) == 0
    return command.capsys.readouterr().out


def replayed(command: Command, step: int) -> bytes:
    out = command.folder / "replayed"
    inputs = [str(command.folder / "model"), str(command.out / "trajectory.jsonl")]
    assert main(["replay", *inputs, f"--to-step={step}", f"--out={out}", "--quiet", "--overwrite"]) == 0
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [(), ("--optimizer=adamezo", "--lr=0.01"), ("--checkpoint=trajectory",)])
def test_the_model_is_that_of_the_best_step(command: Command, options: tuple[str, ...]) -> None:
    said = said_by(command, *OPTIONS, *options, "--keep=best")
    best = best_step(command.out)
    assert 0 < best < 16, "the test needs a best step in the middle"
    assert model_of(command.out) == replayed(command, best)
    assert not (command.out / "best").exists()
    assert f"step {best} is the best of 9 evaluations, and its model was kept" in said
    assert "which is therefore biased low" in said
    assert f"--to-step {best} --out" in said


def test_the_default_is_the_last_step_and_says_how_to_get_the_best(command: Command) -> None:
    said = said_by(command, *OPTIONS)
    assert model_of(command.out) == replayed(command, 16)
    best = best_step(command.out)
    assert f"the lowest held-out loss was {losses_of(command.out)[best]:.4f} at step {best}; " in said
    assert f"zoext finetune --out {command.out} --resume --keep best" in said
    command.works("--resume", "--keep=best")
    assert model_of(command.out) == replayed(command, best)
    command.works("--resume", "--keep=last")
    assert model_of(command.out) == replayed(command, 16)


def test_weights_are_copied_where_the_trajectory_cannot_be_replayed(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*OPTIONS, "--probe=inplace", "--keep=best")
    seen: dict[int, Any] = {}
    note = Training._note_evaluation

    def watch(self: Training, result: Any) -> None:
        weight = self.problem.model.classifier.weight
        seen[self.step] = weight.detach().clone()
        note(self, result)

    monkeypatch.setattr(Training, "_note_evaluation", watch)
    said = said_by(command, *options)
    assert "cannot be replayed: in-place probes" in said
    assert "copies of the best weights are kept" in said
    best = best_step(command.out)
    assert 0 < best < 16
    from safetensors.torch import load_file

    assert load_file(command.out / "model" / "model.safetensors")["classifier.weight"].equal(seen[best])
    # The best step and the one at the last checkpoint, at most.
    copies = sorted(path.name for path in (command.out / "best").iterdir())
    assert f"step-{best:08d}" in copies
    assert len(copies) <= 2


@pytest.mark.parametrize("probe", ["auto", "inplace"])
@pytest.mark.parametrize("failing", [3, 9, 13])
def test_resumed_runs_keep_the_same(
    command: Command, monkeypatch: pytest.MonkeyPatch, probe: str, failing: int
) -> None:
    options = (*OPTIONS, f"--probe={probe}", "--keep=best", "--patience=4")
    whole = command.folder / "whole"
    command.works(*options, f"--out={whole}")
    fails_at(monkeypatch, failing, command.arguments(*options))
    command.works("--resume")
    assert losses_of(command.out) == losses_of(whole)
    assert model_of(command.out) == model_of(whole)
    assert contents(command.out / "best") == contents(whole / "best")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails_at(monkeypatch: pytest.MonkeyPatch, step: int, arguments: list[str]) -> None:
    """Runs until ``step`` steps are taken, and raises."""
    one_step = Training._one_step

    def fails(self: Training) -> object:
        if self.step == step:
            raise MemoryError
        return one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_one_step", fails)
        with pytest.raises(MemoryError):
            main(arguments)


def test_patience_counts_evaluations_without_a_new_lowest_loss(command: Command) -> None:
    command.works(*OPTIONS, f"--out={command.folder / 'whole'}")
    losses = losses_of(command.folder / "whole")
    expected = next(
        step
        for step in range(4, 17, 2)
        if min(losses[earlier] for earlier in range(0, step - 3, 2)) <= min(losses[step], losses[step - 2])
    )
    assert expected < 16, "the test needs a run that stops early"
    said = said_by(command, *OPTIONS, "--patience=2")
    assert max(losses_of(command.out)) == expected
    assert f"stopped at step {expected} of 16: no lower held-out loss in 2 evaluations" in said
    command.works("--resume")
    assert max(losses_of(command.out)) == expected  # it stays stopped
    command.works("--resume", "--patience=99")
    assert losses_of(command.out) == losses
    assert model_of(command.out) == model_of(command.folder / "whole")


@pytest.mark.parametrize(("first", "kept"), [(6, 6), (8, 8)])
def test_a_trajectory_that_begins_later_leads_to_later_steps_only(
    command: Command, first: int, kept: int
) -> None:
    """The old trajectory is corrupted, so a new one begins at a checkpoint; the best step is 6."""
    command.works(*OPTIONS, f"--out={command.folder / 'whole'}")
    losses = losses_of(command.folder / "whole")
    assert min(losses, key=lambda step: losses[step]) == 6
    assert min(range(8, 17, 2), key=lambda step: losses[step]) == 8
    command.works(*OPTIONS, f"--steps={first}")
    path = command.out / "trajectory.jsonl"
    path.write_text(path.read_text().replace('"step":2', '"step":3'))
    said = said_by(command, "--resume", "--keep=best", "--steps=16")
    assert losses_of(command.out) == losses
    which = "the best of 9 evaluations" if first == 6 else "the best one whose model can be had"
    assert f"step {kept} is {which}, and its model was kept" in said
    assert ("step 6, whose model is lost" in said) == (first > 6)
    assert "to reproduce" not in said
    shorter = command.folder / "shorter"
    command.works(*OPTIONS, f"--steps={kept}", f"--out={shorter}")
    assert model_of(command.out) == model_of(shorter)


def test_settings_of_a_run_without_them_are_read(command: Command) -> None:
    command.works(*OPTIONS)
    record = json.loads((command.out / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["keep"] == "last"
    assert record["settings"]["patience"] is None


@pytest.mark.parametrize(("option", "value"), [("--keep", "worst"), ("--patience", "0")])
def test_bad_values_are_refused(command: Command, option: str, value: str) -> None:
    assert option in command.is_refused(f"{option}={value}")
