"""The worked examples of docs/extending.md equal their formulas, on every probe, in 16 bits, replayed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(7, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.body(x)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.float(), labels))


def new_model(dtype: torch.dtype = torch.float32) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Model().to(dtype)


BATCH = {"x": torch.linspace(-2, 2, 35).view(5, 7), "labels": torch.tensor([0, 1, 2, 1, 0])}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page defines, after all of its programs ran."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": new_model(), "load_base": new_model, "loader": [BATCH, BATCH]}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names


def steps_of(make: Callable[[Any], Any], dtype: torch.dtype = torch.float32, count: int = 3) -> Model:
    model = new_model(dtype)
    optimizer = make(model)
    batch = {"x": BATCH["x"].to(dtype), "labels": BATCH["labels"]}
    for _ in range(count):
        optimizer.step(lambda: model(**batch).loss)
    return model


def test_the_last_program_replays(page: dict[str, Any]) -> None:
    moved, again = page["model"].parameters(), page["again"].parameters()
    assert all(torch.equal(a, b) for a, b in zip(moved, again, strict=True))


@pytest.mark.parametrize("precision", ["stochastic", "residual"])
@pytest.mark.parametrize("probe", ["streamed", "inplace", "batched"])
@pytest.mark.parametrize("update", [zoext.SGD(), zoext.SignReplay(horizon=2)], ids=["linear", "window"])
def test_a_mask_is_all_that_moves(page: dict[str, Any], probe: str, precision: str, update: Any) -> None:
    dtype, before = torch.bfloat16, new_model(torch.bfloat16)
    after = new_model(dtype)
    direction = page["SparseMask"](density=0.4, mask_seed=3)
    optimizer = zoext.ZerothOrderOptimizer(
        after, direction=direction, update=update, lr=0.1, mu=0.1, probe=probe, precision=precision
    )
    x, labels = BATCH["x"].to(dtype), BATCH["labels"]

    def closure(copies: int = 1) -> Tensor:
        batch = zoext.repeat({"x": x, "labels": labels}, copies)
        losses = nn.functional.cross_entropy(
            after.head(torch.tanh(after.body(batch["x"]))).float(), batch["labels"], reduction="none"
        )
        means = losses.view(copies, -1).mean(1)
        return means if probe == "batched" else means.squeeze()

    for _ in range(3):
        optimizer.step(closure)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    for key, (old, new) in enumerate(pairs):
        outside = zoext.noise.normal(old.shape, seed=3, key=key).abs() > 0.5244  # P(|z| < .5244) = .4
        assert torch.equal(old[outside], new[outside])
        assert (old != new)[~outside].any()


def test_a_mask_takes_its_part_of_the_dense_direction(page: dict[str, Any]) -> None:
    theta, seed = nn.Parameter(torch.zeros(50, 40)), zoext.noise.step_seed(0, 0)
    direction = page["SparseMask"](density=0.25, mask_seed=9)
    optimizer = zoext.ZerothOrderOptimizer([theta], direction=direction, lr=1.0, mu=1.0)
    mask = zoext.noise.normal((50, 40), seed=9).abs() < 0.31864  # P(|z| < .31864) = .25
    expected = mask * zoext.noise.normal((50, 40), seed=seed)
    optimizer.step(lambda: (theta * expected).sum() / expected.square().sum())
    torch.testing.assert_close(theta.detach(), -expected)
    assert 0.2 < mask.float().mean() < 0.3
    with pytest.raises(ValueError, match="density must be between 0 and 1, not 1"):
        page["SparseMask"](density=1)


def test_a_median_ignores_one_slope(page: dict[str, Any]) -> None:
    seeds, mu, asked = torch.tensor([4]), 0.5, []
    losses = {0.5: 1.0, -0.5: 0.0, 1.0: 90.0, -1.0: 0.0, 2.0: 4.0, -2.0: -4.0}

    def probe(_: Tensor, coefficients: Tensor) -> Tensor:
        asked.append(mu * coefficients.item())
        return torch.tensor(losses[asked[-1]])

    estimate = page["MedianSlope"](scales=3).estimate(probe, seeds, mu)
    assert sorted(asked) == sorted(losses)
    assert estimate.coefficients.tolist() == [2.0]  # of the slopes 1, 45 and 2
    assert estimate.forwards == 6
    losses[2.0] = float("inf")
    estimate = page["MedianSlope"](scales=3).estimate(probe, seeds, mu)
    assert not estimate.finite
    assert estimate.coefficients.tolist() == [0.0]
    with pytest.raises(ValueError, match="scales must be an odd number, not 2"):
        page["MedianSlope"](scales=2)


def test_signs_have_the_length_of_lr(page: dict[str, Any]) -> None:
    theta = nn.Parameter(torch.zeros(30))
    z = zoext.noise.normal((30,), seed=zoext.noise.step_seed(0, 0))
    optimizer = zoext.ZerothOrderOptimizer([theta], update=page["SignSGD"](), lr=0.25)
    optimizer.step(lambda: -7 * (theta * z).sum())
    torch.testing.assert_close(theta.detach(), 0.25 * z)


def test_a_running_clip_equals_its_formula(page: dict[str, Any]) -> None:
    theta = nn.Parameter(torch.zeros(30, dtype=torch.float64))
    update = page["RunningClip"](limit=2.0, beta=0.5)
    optimizer = zoext.ZerothOrderOptimizer([theta], update=update, lr=0.1, weight_decay=0.2, mu=1.0)
    expected, square = torch.zeros_like(theta), 0.0
    for number, slope in enumerate((1.0, -3.0, 9.0, 0.5)):
        z = zoext.noise.normal((30,), seed=zoext.noise.step_seed(0, number)).double()
        weights = slope * z / (z * z).sum()
        optimizer.step(lambda weights=weights: (theta * weights).sum())
        square = square or slope**2
        clipped = max(min(slope, 2 * square**0.5), -2 * square**0.5)
        expected = expected - 0.1 * clipped * z - 0.1 * 0.2 * expected
        square = 0.5 * square + 0.5 * clipped**2
    torch.testing.assert_close(theta.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert mean_square(optimizer) == pytest.approx(square, rel=1e-5)


def test_a_loss_that_is_not_finite_leaves_the_clip_alone(page: dict[str, Any]) -> None:
    model = new_model()
    optimizer = zoext.ZerothOrderOptimizer(model, update=page["RunningClip"](), lr=0.1, nonfinite="skip")
    squares = []
    for factor in (float("nan"), 1.0, float("nan")):
        before = model.head.weight.detach().clone()
        optimizer.step(lambda factor=factor: factor * model(**BATCH).loss)
        assert torch.equal(before, model.head.weight) == math.isnan(factor)
        squares.append(mean_square(optimizer))
    assert squares[0] == 0
    assert squares[1] == squares[2] > 0


def mean_square(optimizer: zoext.ZerothOrderOptimizer) -> float:
    return float(optimizer.param_groups[0]["update_state"]["mean_square"])


@pytest.mark.parametrize("split", [1, 2])
def test_a_saved_run_continues_with_the_same_bits(page: dict[str, Any], split: int) -> None:
    whole = steps_of(page["build"])
    model = new_model()
    optimizer = page["build"](model)
    for number in range(3):
        if number == split:
            saved = optimizer.state_dict()
            optimizer = page["build"](model)
            optimizer.load_state_dict(saved)
        optimizer.step(lambda: model(**BATCH).loss)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
