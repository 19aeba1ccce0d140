"""Runs of AGZO whose layers are unused, read in other ways or are experts replay and resume bit for bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

import zoext

STEPS = 9


class Model(nn.Module):
    """Experts that are used by turns, a stack of experts, and a layer that every step uses in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.stack = nn.Parameter(torch.randn(4, 5, 3))
        self.changing = nn.Linear(3, 3)

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = x.to(self.stack.dtype)
        out = F.linear(self.experts[step % 3](x), self.stack[step % 4])
        if step % 5 != 4:  # the stack is unused in part, or as a whole
            out = out + F.linear(x, self.stack[3])
        weight = self.changing.weight
        kinds = (
            lambda: self.changing(x).mean(),
            lambda: weight.square().mean(),
            lambda: (x @ weight.T).mean(),
            lambda: 0,
        )
        return (out.float().square().mean() + kinds[step % 4]()).float()


RECIPES: dict[str, Any] = {
    "sgd": (zoext.SGD(), 0.05),
    "adam": (zoext.AdamReplay(betas=(0.6, 0.8), horizon=3, eps=1e-3), 0.02),
    "sign": (zoext.SignReplay(beta=0.7, horizon=4), 0.01),
}


def model_of(dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def optimizer_of(
    model: nn.Module, recipe: str, balance: str = "paper", **options: Any
) -> zoext.ZerothOrderOptimizer:
    update, lr = RECIPES[recipe]
    return zoext.ZerothOrderOptimizer(
        model,
        direction=zoext.ActivationSubspace(rank=2, balance=balance),
        estimator=zoext.ForwardDifference(),
        update=update,
        lr=lr,
        mu=0.05,
        weight_decay=0.1,
        seed=11,
        **options,
    )


def run(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        optimizer.step(lambda x=x, step=step: model(x, step))


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


CASES = [
    ("sgd", torch.float32, "nearest", "paper"),
    ("sgd", torch.bfloat16, "stochastic", "matched"),
    ("sgd", torch.float16, "residual", "paper"),
    ("adam", torch.float32, "nearest", "paper"),
    ("adam", torch.bfloat16, "stochastic", "freeze"),
    ("sign", torch.float64, "nearest", "matched"),
]


@pytest.mark.parametrize(("recipe", "dtype", "precision", "balance"), CASES)
def test_replay(recipe: str, dtype: torch.dtype, precision: str, balance: str, tmp_path: Path) -> None:
    model, base = model_of(dtype), model_of(dtype)
    optimizer = optimizer_of(model, recipe, balance, precision=precision)
    with zoext.Trajectory(tmp_path / "run.jsonl", optimizer, frames=True):
        run(model, optimizer, 0, STEPS)
    zoext.replay(base, tmp_path / "run.jsonl")
    assert_equal(model, base)
    assert not torch.equal(model.stack, model_of(dtype).stack)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume(recipe: str, tmp_path: Path) -> None:
    whole = model_of(torch.float32)
    run(whole, optimizer_of(whole, recipe), 0, STEPS)

    model = model_of(torch.float32)
    optimizer = optimizer_of(model, recipe)
    run(model, optimizer, 0, 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model = Model()
    model.load_state_dict(weights)
    optimizer = optimizer_of(model, recipe)
    optimizer.load_state_dict(state)
    run(model, optimizer, 5, STEPS)
    assert_equal(whole, model)


def test_probes_agree() -> None:
    slopes = []
    for probe in ("streamed", "inplace"):
        model = model_of(torch.float64)
        optimizer = optimizer_of(model, "sgd", probe=probe)
        found = []
        for step in range(STEPS):
            run(model, optimizer, step, step + 1)
            assert optimizer.last_estimate is not None
            found.append(float(optimizer.last_estimate.coefficients))
        slopes.append(found)
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-5)


@pytest.mark.parametrize("how", ["of a frozen parameter", "twice", "of another stack"])
def test_frames_that_do_not_fit_are_refused(how: str, tmp_path: Path) -> None:
    from zoext.trajectory import TrajectoryError
    from zoext.trajectory._format import frames

    model = model_of(torch.float32)
    optimizer = optimizer_of(model, "sgd")
    path = tmp_path / "run.jsonl"
    with zoext.Trajectory(path, optimizer, frames=True):
        run(model, optimizer, 0, 1)
    side = frames.path_beside(path)
    document = load(side.read_bytes())
    stack = next(name for name, factor in document.items() if factor.dim() == 3)
    if how == "of a frozen parameter":
        document["unused.99"] = torch.empty(0)
    elif how == "twice":
        document[f"unused.{stack.partition('.')[2]}"] = torch.empty(0)
    else:
        document[stack] = document[stack][1:].clone()

    def read(*_: Any) -> Any:
        sides: dict[str, dict[int, Tensor]] = {"left": {}, "right": {}, "unused": {}}
        for name, factor in load(save(document)).items():
            sides[name.partition(".")[0]][int(name.partition(".")[2])] = factor
        return zoext.directions.Frame(sides["left"], sides["right"], frozenset(sides["unused"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "read", read)
        with pytest.raises(TrajectoryError, match="corrupted at byte 0"):
            zoext.replay(model_of(torch.float32), path)
