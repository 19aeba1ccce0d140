"""The table and the figure agree with the raw records, and comparisons on the fixture language model and the
demo work."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from support import curves
from support.compare_command import ALL, CompareCommand, prepare, register_rivals
from support.tiny_models import FIXTURES
from zoext.cli import main
from zoext.cli._comparison.results import Point, forwards_to_reach


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished comparison of three optimizers, and its figure."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        savefig(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        curves.drawn(patch)
        patch.setattr(Figure, "savefig", keep)
        command = prepare(tmp_path_factory.mktemp("compared"), None, patch)  # type: ignore[arg-type]
        options = [*("--optimizers", ",".join(ALL)), *("--seeds", "3"), *("--forwards", "25")]
        assert main(command.arguments(*options, "--lr-factors", "1,4")) == 0
        command.figure = figures[-1]  # type: ignore[attr-defined]
        yield command


def final_runs(command: CompareCommand, method: str) -> tuple[float, list[list[dict[str, Any]]]]:
    """The lr with the most seeds, and the evaluations of each run, from the raw records alone."""
    seeds: dict[float, set[int]] = {}
    for end in command.of_kind("end"):
        if end["method"] == method:
            seeds.setdefault(end["lr"], set()).add(end["seed"])
    lr = max(seeds, key=lambda lr: len(seeds[lr]))
    assert seeds[lr] == {0, 1, 2}
    assert all(len(others) == 1 for other, others in seeds.items() if other != lr)
    evaluations = [e for e in command.of_kind("evaluation") if (e["method"], e["lr"]) == (method, lr)]
    return lr, [[e for e in evaluations if e["seed"] == seed] for seed in range(3)]


def figures_of(runs: list[list[dict[str, Any]]], name: str) -> np.ndarray:
    """[seeds, evaluations]"""
    return np.array([[evaluation[name] for evaluation in run] for run in runs])


def change(values: np.ndarray) -> str:
    error = values[:, -1].std(ddof=1) / np.sqrt(len(values))
    return f"{values[:, 0].mean():.4f} → {values[:, -1].mean():.4f} ± {error:.4f}"


def test_the_table_is_that_of_the_raw_records(compared: CompareCommand) -> None:
    rows = {row["optimizer"]: row for row in compared.tables()[0]}
    assert list(rows) == list(ALL)
    target = figures_of(final_runs(compared, "mezo")[1], "report_loss")[:, -1].mean()
    for method, row in rows.items():
        lr, runs = final_runs(compared, method)
        losses, forwards = figures_of(runs, "report_loss"), figures_of(runs, "forwards")
        assert row["lr"].removesuffix(" (edge)") == f"{lr:.3g}"
        assert row["held-out loss"] == change(losses)
        assert row["accuracy"] == change(figures_of(runs, "report_accuracy"))
        reached = first_at_or_below(target, forwards[0], losses.mean(0))
        if reached is None:
            assert (row["forwards to mezo's loss"], row["of the budget"]) == ("-", "-")
        else:
            assert float(row["forwards to mezo's loss"]) == pytest.approx(reached, abs=0.51)
            assert row["of the budget"] == f"{reached / 25:.0%}"
        ends = [e for e in compared.of_kind("end") if (e["method"], e["lr"]) == (method, lr)]
        seconds = sum(end["seconds"] for end in ends) / sum(end["forwards"] for end in ends)
        assert row["s per 1000 forwards"] == f"{1000 * seconds:.3g}"
        (cost,) = (record for record in compared.of_kind("method") if record["method"] == method)
        assert row["forwards per step"] == str(cost["forwards_a_step"])
        assert row["extra MiB"] == f"{cost['extra_bytes'] / 2**20:.2f}"


def first_at_or_below(target: float, forwards: np.ndarray, losses: np.ndarray) -> float | None:
    """By a fine search between evaluations."""
    places = np.linspace(forwards[0], forwards[-1], 100_001)
    found = places[np.interp(places, forwards, losses) <= target + 1e-9]
    return None if not len(found) else float(found[0])


def test_the_table_of_the_sweep_is_that_of_the_raw_records(compared: CompareCommand) -> None:
    rows = {row["optimizer"]: row for row in compared.tables()[1]}
    assert list(rows) == list(ALL)
    for method, row in rows.items():
        default = float(row.pop("default lr"))
        row.pop("optimizer")
        shown = {round(default * float(name[1:]), 9): text for name, text in row.items() if text}
        last = {
            round(e["lr"], 9): e["selection_loss"]
            for e in compared.of_kind("evaluation")
            if e["method"] == method and e["phase"] == "sweep"
        }
        for end in compared.of_kind("end"):
            if end["method"] == method and end["diverged"] is not None:
                last[round(end["lr"], 9)] = math.inf
        assert {lr: text.strip("*") for lr, text in shown.items()} == {
            lr: f"{loss:.4f}" if math.isfinite(loss) else "diverged" for lr, loss in last.items()
        }
        assert [lr for lr, text in shown.items() if "**" in text] == [min(last, key=last.__getitem__)]
        assert min(last, key=last.__getitem__) == pytest.approx(final_runs(compared, method)[0])


def test_the_picture_is_that_of_the_raw_records(compared: CompareCommand) -> None:
    assert (compared.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    panels = compared.figure.axes  # type: ignore[attr-defined]
    for axes, name in zip(panels, ("report_loss", "report_accuracy"), strict=True):
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert len(lines) == len(axes.collections) == len(ALL)
        assert len({line.get_color() for line in lines}) == len(ALL)
        for method, line, band in zip(ALL, lines, axes.collections, strict=True):
            lr, runs = final_runs(compared, method)
            values, forwards = figures_of(runs, name), figures_of(runs, "forwards")[0]
            assert line.get_label() == f"{method}, lr {lr:.3g}"
            np.testing.assert_allclose(line.get_xdata(), forwards)
            np.testing.assert_allclose(line.get_ydata(), values.mean(0))
            corners = {tuple(point) for point in band.get_paths()[0].vertices.round(9)}
            for x, low, high in zip(forwards, values.min(0), values.max(0), strict=True):
                assert {(float(x), round(low, 9)), (float(x), round(high, 9))} <= corners


def test_what_is_shown_is_what_is_written(
    compared: CompareCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (compared.out / "table.md").read_text(encoding="utf-8")
    assert main(["compare", "--out", str(compared.out), "--resume"]) == 0
    assert page in capsys.readouterr().out
    assert "mean ± standard error over 3 seeds, on 8 held-out examples; 8 others selected the lr" in page
    assert "1 seed of these took part in the selection" in page


@pytest.mark.parametrize(
    ("target", "expected"),
    [(3.0, 0.0), (2.5, 5.0), (2.0, 10.0), (1.75, 22.5), (1.5, 25.0), (1.0, 30.0), (0.9, None)],
)
def test_forwards_to_reach_a_loss(target: float, expected: float | None) -> None:
    means = {0: 3.0, 10: 2.0, 20: 2.0, 30: 1.0, 40: 1.2}
    curve = [Point(forwards, (mean - 0.5, mean + 0.5)) for forwards, mean in means.items()]
    reached = forwards_to_reach(target, curve)
    assert reached == (None if expected is None else pytest.approx(expected))


def test_without_mezo_nothing_is_measured_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = prepare(tmp_path, capsys, monkeypatch)
    command.works("--optimizers", "one-sided", "--seeds", "1", "--lr-factors", "1")
    ((row,),) = command.tables()
    assert "±" not in row["held-out loss"]
    assert not any("mezo" in column for column in row)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the small language model is not beside this checkout")
def test_the_fixture_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register_rivals(monkeypatch)
    curves.drawn(monkeypatch)
    command = CompareCommand(tmp_path, capsys)
    command.works(
        *("--model", str(FIXTURES / "stories260k"), "--data", str(FIXTURES / "fables_train.txt")),
        *("--valid-data", str(FIXTURES / "fables_valid.txt"), "--max-length", "24", "--batch-size", "4"),
        *("--optimizers", "mezo,signs", "--lr", "1e-4", "--mu", "1e-3", "--lr-factors", "0.5,1"),
        *("--forwards", "24", "--eval-every", "12", "--seeds", "2"),
    )
    rows, sweep = command.tables()
    assert [row["optimizer"] for row in rows + sweep] == ["mezo", "signs"] * 2
    assert not any("accuracy" in column for column in rows[0])
    for run in (row["held-out loss"] for row in rows):
        before, after = run.split(" → ")
        assert float(after.split(" ± ")[0]) < float(before)
    assert (command.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_rivals(monkeypatch)
    monkeypatch.chdir(tmp_path)
    options = ["--optimizers", "mezo", "--forwards", "2", "--lr-factors", "1", "--seeds", "1"]
    assert main(["compare", *options, "--device", "cpu", "--quiet"]) == 0
    assert os.listdir("runs") == ["compare-1"]
    page = (tmp_path / "runs" / "compare-1" / "table.md").read_text(encoding="utf-8")
    assert page.startswith("# MiniLM on human word ratings: 2 forward passes per run")
    assert "| 0.0001 " in page
