"""Each optimizer of a comparison is swept with all ``--schedules``, on equal grids, and keeps its best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from support.compare_command import CompareCommand, prepare
from zoext.cli._comparison import plan
from zoext.cli._comparison.records import Choice, Outcome, Outcomes, Run
from zoext.cli._comparison.settings import ComparisonSettings


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CompareCommand:
    return prepare(tmp_path, capsys, monkeypatch)


def test_the_best_pair_is_chosen_and_its_edge_extended() -> None:
    settings = ComparisonSettings(
        optimizers=("mezo", "lozo"), lr=1.0, forwards=100, seeds=1, schedules=("constant", "cosine")
    )
    best = {"mezo": Choice(8.0, "cosine"), "lozo": Choice(0.5, "constant")}

    def loss(run: Run) -> float:
        wanted = best[run.method]
        return abs(math.log(run.lr / wanted.lr)) + (run.schedule != wanted.schedule) * 0.1

    done: Outcomes = {}
    phases = []
    while (following := plan.next_run(settings, done)) is not None:
        phases.append(following[0])
        run = following[1]
        done[run] = Outcome(({"selection_loss": loss(run)},), {"diverged": None})
    assert {method: plan.sweep(settings, method, done).best for method in best} == best
    assert plan.sweep(settings, "mezo", done).added == Choice(8.0, "cosine")
    assert plan.sweep(settings, "mezo", done).at_edge
    assert phases == [plan.SWEEP] * (10 + 1 + 10)  # with one seed, the sweep's runs are the final ones
    assert plan.forwards_to_do(settings, done) == 0


def test_lr_falls_with_the_forward_passes(command: CompareCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoext.cli._problem import steps

    seen: dict[str, list[float]] = {}
    take = steps.take

    def watch(problem, optimizer, settings, *more):  # type: ignore[no-untyped-def]
        if settings.lr == 0.003:
            seen.setdefault(settings.schedule, []).append(optimizer.param_groups[0]["lr"])
        return take(problem, optimizer, settings, *more)

    monkeypatch.setattr(steps, "take", watch)
    command.works("--schedules=constant,linear", "--lr-factors=1", "--seeds=1", "--warmup=4")
    # Six steps of two forward passes each.
    assert seen["constant"] == [0.0015, 0.003, 0.003, 0.003, 0.003, 0.003]
    assert seen["linear"] == pytest.approx([0.0015, 0.003, 0.003, 0.00225, 0.0015, 0.00075])
    (row,), swept = command.tables()
    assert [each["schedule"] for each in swept] == ["constant", "linear"]
    assert row["schedule"] in ("constant", "linear")
    assert sum("**" in each["x1"] for each in swept) == 1
    assert {record["schedule"] for record in command.of_kind("end")} == {"constant", "linear"}


def test_a_comparison_without_schedules_gains_one(command: CompareCommand) -> None:
    command.works("--lr-factors=1", "--seeds=1")
    path = command.out / "runs.jsonl"
    path.write_text(path.read_text().replace('"schedule": "constant", ', ""))  # as earlier versions wrote it
    before = path.read_text()
    command.works("--resume", "--schedules=constant,cosine")
    assert path.read_text().startswith(before)
    assert [end.get("schedule") for end in command.of_kind("end")] == [None, "cosine"]


@pytest.mark.parametrize("value", ["step", "linear,linear", ""])
def test_unknown_schedules_are_refused(command: CompareCommand, value: str) -> None:
    assert "--schedules" in command.is_refused(f"--schedules={value}")


def test_a_warmup_is_shorter_than_the_sweep(command: CompareCommand) -> None:
    error = command.is_refused("--warmup=8", "--sweep-forwards=8")
    assert "--warmup 8: must be less than --sweep-forwards, which is 8" in error
