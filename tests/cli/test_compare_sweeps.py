"""The sweep selects the lr with the lowest held-out loss, extends its grid by one if the best is at the edge,
and rejects an lr at which a run diverged."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from support import curves
from support.compare_command import CompareCommand, prepare
from zoext.cli._comparison import plan
from zoext.cli._comparison.records import Choice, Outcome, Outcomes, Run
from zoext.cli._comparison.settings import ComparisonSettings
from zoext.cli._comparison.start import Start

#: The loss by lr and seed; None if the run diverges.
Task = Callable[[float, int], float | None]


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CompareCommand:
    return prepare(tmp_path, capsys, monkeypatch)


def outcome(loss: float | None) -> Outcome:
    evaluations = () if loss is None else ({"selection_loss": loss},)
    return Outcome(evaluations, {"diverged": "blew up" if loss is None else None})


def play(settings: ComparisonSettings, task: Task) -> tuple[list[tuple[str, Run]], Outcomes]:
    """All runs in order, and their outcomes."""
    done: Outcomes = {}
    played = []
    while (following := plan.next_run(settings, done)) is not None:
        assert following[1] not in done
        played.append(following)
        before = plan.forwards_to_do(settings, done)
        done[following[1]] = outcome(task(following[1].lr, following[1].seed))
        after = plan.forwards_to_do(settings, done)
        # The estimate never counts a finished run; extensions add runs, divergence of all removes them.
        assert after <= before + settings.sweep_seeds * settings.sweep_budget - following[1].budget
    assert plan.forwards_to_do(settings, done) == 0
    return played, done


def settings_of(**more: object) -> ComparisonSettings:
    defaults: dict[str, object] = {"optimizers": ("mezo",), "lr": 1.0, "forwards": 100}
    return ComparisonSettings(**{**defaults, **more})  # type: ignore[arg-type]


def constant(lr: float) -> Choice:
    return Choice(lr, "constant")


def valley(best: float) -> Task:
    return lambda lr, seed: abs(math.log(lr / best))


@pytest.mark.parametrize("best", [0.5, 1.0, 2.0])
def test_the_lr_of_the_lowest_loss_is_taken(best: float) -> None:
    played, done = play(settings_of(), valley(best))
    sweep = plan.sweep(settings_of(), "mezo", done)
    assert (sweep.best, sweep.added, sweep.at_edge) == (constant(best), None, False)
    assert [run.lr for phase, run in played if phase == plan.SWEEP] == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert [(run.lr, run.seed) for phase, run in played if phase == plan.FINAL] == [(best, 1), (best, 2)]


@pytest.mark.parametrize(
    ("best", "added", "taken", "at_edge"),
    [(4.0, 8.0, 4.0, False), (100.0, 8.0, 8.0, True), (0.25, 0.125, 0.25, False), (0.01, 0.125, 0.125, True)],
)
def test_the_grid_is_extended_once_beyond_its_edge(
    best: float, added: float, taken: float, at_edge: bool
) -> None:
    played, done = play(settings_of(), valley(best))
    sweep = plan.sweep(settings_of(), "mezo", done)
    assert (sweep.best, sweep.added) == (constant(taken), constant(added))
    assert sweep.at_edge == at_edge
    swept = [run.lr for phase, run in played if phase == plan.SWEEP]
    assert swept == [0.25, 0.5, 1.0, 2.0, 4.0, added]
    assert [choice.lr for choice, _ in sweep.losses] == sorted(swept)


def test_one_diverged_seed_is_enough_to_lose() -> None:
    settings = settings_of(sweep_seeds=2)

    def task(lr: float, seed: int) -> float | None:
        return None if lr == 2.0 and seed == 1 else abs(lr - 2.0)

    _, done = play(settings, task)
    sweep = plan.sweep(settings, "mezo", done)
    assert sweep.best == constant(1.0)
    assert dict(sweep.losses)[constant(2.0)] == math.inf


def test_the_mean_over_the_seeds_of_the_sweep_decides() -> None:
    settings = settings_of(sweep_seeds=2)
    losses = {(1.0, 0): 0.0, (1.0, 1): 1.0, (2.0, 0): 0.4, (2.0, 1): 0.4}
    _, done = play(settings, lambda lr, seed: losses.get((lr, seed), 0.9))
    assert plan.sweep(settings, "mezo", done).best == constant(2.0)


def test_a_method_that_always_diverges_has_no_final_runs() -> None:
    played, done = play(settings_of(), lambda lr, seed: None)
    sweep = plan.sweep(settings_of(), "mezo", done)
    assert (sweep.best, sweep.added) == (None, constant(0.125))
    assert all(phase == plan.SWEEP for phase, _ in played)


def test_a_method_that_diverges_on_its_whole_grid_is_tried_below_it() -> None:
    _, done = play(settings_of(), lambda lr, seed: None if lr > 0.2 else 0.3)
    assert plan.sweep(settings_of(), "mezo", done).best == constant(0.125)


def test_runs_of_a_shorter_sweep_are_not_taken_for_final_ones() -> None:
    settings = settings_of(sweep_forwards=40, seeds=2)
    played, _ = play(settings, valley(1.0))
    assert [run.budget for _, run in played] == [40] * 5 + [100] * 2


def test_a_single_lr_needs_no_sweep() -> None:
    played, _ = play(settings_of(lr_factors=(1.0,)), valley(1.0))
    assert played == [(plan.FINAL, Run("mezo", 1.0, "constant", seed, 100)) for seed in range(3)]


def test_all_sweeps_come_before_all_final_runs(command: CompareCommand) -> None:
    played, _ = play(settings_of(optimizers=("mezo", "signs")), valley(1.0))
    phases = [phase for phase, _ in played]
    assert phases == [plan.SWEEP] * 10 + [plan.FINAL] * 4


def test_a_run_that_diverges_is_recorded_and_the_rest_goes_on(command: CompareCommand) -> None:
    command.works("--lr-factors", "1,1e30", "--forwards", "20", "--seeds", "1")
    ends = {end["lr"]: end for end in command.of_kind("end")}
    overflown = ends[0.003 * 1e30]
    assert "not finite" in overflown["diverged"]
    assert overflown["forwards"] < 20
    (row,), (sweep,) = command.tables()
    assert sweep["x1e+30"] == "diverged"
    # The best was at the lower edge, so the grid was extended by one lr below.
    assert min(ends) == pytest.approx(0.003 * 1e-30)
    assert ends[min(ends)]["diverged"] is None
    assert row["lr"] in ("0.003", "3e-33 (edge)")


@pytest.mark.parametrize(("factor", "diverges"), [(1.9, False), (2.1, True)])
def test_a_held_out_loss_that_doubles_is_a_divergence(
    command: CompareCommand, monkeypatch: pytest.MonkeyPatch, factor: float, diverges: bool
) -> None:
    starts: list[dict[str, float]] = []

    def evaluate(self: Start) -> dict[str, float]:
        starts.append({"selection_loss": 0.7, "report_loss": 0.8} if not starts else dict(starts[0]))
        if len(starts) == 3:  # the second evaluation of the run
            starts[-1]["selection_loss"] *= factor
        return {**starts[-1], "selection_loss_error": 0.1, "report_loss_error": 0.1}

    monkeypatch.setattr(Start, "evaluate", evaluate)
    command.works("--lr-factors", "1", "--seeds", "1")
    (end,) = command.of_kind("end")
    if diverges:
        assert end["diverged"] == "held-out loss 1.47 after 10 forwards, 0.7 at the start"
        assert end["forwards"] == 10
    else:
        assert end["diverged"] is None
        assert end["forwards"] == 12


def test_all_runs_diverge(command: CompareCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    curves.drawn(monkeypatch)
    command.works("--optimizers", "mezo,signs", "--lrs", "mezo=1e20,signs=1e-3", "--lr-factors", "1,2")
    rows, _ = command.tables()
    assert [row["optimizer"] for row in rows] == ["mezo", "signs"]
    assert rows[0]["held-out loss"] == "diverged"
    assert rows[0]["lr"] == "-"
    assert "→" in rows[1]["held-out loss"]
    assert (command.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_seed_that_diverges_at_the_chosen_lr_is_named(
    command: CompareCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoext.cli._problem import steps

    take = steps.take

    def fails(problem, optimizer, settings, number, device, ranks):  # type: ignore[no-untyped-def]
        if settings.seed == 1 and number == 4:
            raise FloatingPointError
        return take(problem, optimizer, settings, number, device, ranks)

    monkeypatch.setattr(steps, "take", fails)
    command.works("--seeds", "3", "--lr-factors", "1")
    ((row,),) = command.tables()
    assert row["held-out loss"].endswith("(1 of 3 seeds diverged)")
    assert "after 8 forwards" in next(end for end in command.of_kind("end") if end["seed"] == 1)["diverged"]
