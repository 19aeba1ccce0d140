"""``zoext visualize functions`` runs the optimizers of zoext and of torch on functions of two variables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zoext
from zoext.cli import main
from zoext.cli._pictures import sweep
from zoext.cli._pictures.descent import GRADIENT_FORWARDS, METHODS, MU, descend
from zoext.cli._pictures.functions import FUNCTIONS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_minimum_has_value_and_gradient_zero(name: str) -> None:
    function = FUNCTIONS[name]
    for minimum in function.minima:
        at = torch.tensor(minimum, dtype=torch.float64, requires_grad=True)
        value = function.of(at[0], at[1])
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-24)
        assert at.grad is not None
        assert at.grad.abs().max().item() < 1e-11


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("beale", (0.0, 0.0), 1.5**2 + 2.25**2 + 2.625**2),
        ("rosenbrock", (-1.2, 1.0), 24.2),
        ("himmelblau", (0.0, 0.0), 170.0),
        ("double-well", (0.0, 0.0), 0.25),
    ],
)
def test_known_values(name: str, at: tuple[float, float], value: float) -> None:
    x, y = torch.tensor(at, dtype=torch.float64)
    assert FUNCTIONS[name].of(x, y).item() == pytest.approx(value, rel=1e-14)


def test_everything_to_be_seen_is_in_the_window() -> None:
    for function in FUNCTIONS.values():
        for point in (function.start, *function.minima):
            assert all(low < at < high for at, (low, high) in zip(point, function.window, strict=True))


def test_gradient_descent_equals_its_formula() -> None:
    found = descend(FUNCTIONS["double-well"], METHODS["gradient-descent"], 0.07, forwards=23, seed=0)
    x, y = FUNCTIONS["double-well"].start
    points = [(x, y)]
    for _ in range(23 // GRADIENT_FORWARDS):
        x, y = x - 0.07 * (x**3 - x), y - 0.07 * 2 * y
        points.append((x, y))
    assert torch.tensor(found.points) == pytest.approx(torch.tensor(points), rel=1e-14)
    assert found.forwards == tuple(range(0, 22, 3))
    assert found.values == pytest.approx([(x * x - 1) ** 2 / 4 + y * y for x, y in points], rel=1e-14)


def test_the_optimizers_are_those_of_zoext() -> None:
    found = descend(FUNCTIONS["beale"], METHODS["adamezo"], 0.02, forwards=31, seed=5)
    at = torch.nn.Parameter(torch.tensor(FUNCTIONS["beale"].start, dtype=torch.float64))
    optimizer = zoext.AdaMeZO([at], lr=0.02, mu=MU, seed=5)
    for _ in range(15):
        optimizer.step(lambda: FUNCTIONS["beale"].of(at[0], at[1]))
    assert found.points[-1] == tuple(at.tolist())
    assert found.forwards == tuple(range(0, 31, 2))


@pytest.mark.parametrize("name", METHODS)
def test_no_optimizer_exceeds_the_budget(name: str) -> None:
    for budget in (1, 11):
        found = descend(FUNCTIONS["himmelblau"], METHODS[name], 1e-4, budget, seed=1)
        assert found.forwards[0] == 0
        assert found.forwards[-1] <= budget
        assert len(found.points) == len(found.values) == len(found.forwards)
    assert len(found.points) > 1


def test_a_diverged_run_ends() -> None:
    found = descend(FUNCTIONS["rosenbrock"], METHODS["gradient-descent"], 1.0, forwards=3000, seed=0)
    assert len(found.points) < 10


def test_grids_are_of_equal_size_and_hold_the_learning_rates() -> None:
    assert sweep.CHOSEN.keys() == FUNCTIONS.keys()
    for rates in sweep.CHOSEN.values():
        assert rates.keys() == METHODS.keys()
        for name, lr in rates.items():
            grid = sweep.grid(METHODS[name])
            assert len(set(grid)) == sweep.GRID_SIZE
            assert lr in grid[1:-1], name


@pytest.mark.parametrize(("name", "method"), [("himmelblau", "gradient-descent"), ("beale", "adam")])
def test_the_sweep_finds_the_learning_rates(name: str, method: str) -> None:
    chosen = sweep.best_lr(FUNCTIONS[name], METHODS[method], sweep.FORWARDS)
    assert chosen == sweep.CHOSEN[name][method]


def test_the_sweep_takes_the_best_of_the_grid() -> None:
    """On the double well, gradient descent divides y by 1 - 2 lr: of the grid, .46 is nearest to 1/2."""
    assert sweep.best_lr(FUNCTIONS["double-well"], METHODS["gradient-descent"], 60) == 0.46


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "pictures"
    assert (
        main(["visualize", "functions", "--out", str(out), "--forwards=19", "--seed=3", "--format=svg"]) == 0
    )
    assert {path.name for path in out.iterdir()} == {"functions.svg", "functions.json"}
    assert "Rosenbrock" in (said := capsys.readouterr().out)
    assert f"{out / 'functions.svg'}\n" in said
    numbers = json.loads((out / "functions.json").read_text())
    assert numbers["functions"].keys() == FUNCTIONS.keys()
    found = descend(FUNCTIONS["beale"], METHODS["fzoo"], sweep.CHOSEN["beale"]["fzoo"], 19, 3)
    record = numbers["functions"]["beale"]["fzoo"]
    assert record["values"] == list(found.values)
    assert record["forwards"] == [0, 9, 18]
