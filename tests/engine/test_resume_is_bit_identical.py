"""Training continues from a `state_dict` bit for bit, and two processes with one seed agree."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

import zoext
from support.graphed_runs import same


def setup(dtype: torch.dtype, **axes: object) -> tuple[nn.Module, zoext.ZerothOrderOptimizer, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 3)).to(dtype)
    optimizer = zoext.ZerothOrderOptimizer(model, lr=3e-2, mu=1e-2, weight_decay=0.1, seed=2**64 - 3, **axes)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    return model, optimizer, scheduler


def train(model: nn.Module, optimizer: zoext.ZerothOrderOptimizer, scheduler: object, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 7, generator=generator).to(dtype)
        y = torch.randint(0, 3, (5,), generator=generator)
        optimizer.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x).float(), y))
        scheduler.step()  # type: ignore[attr-defined]


AXES = [
    {},
    {"direction": zoext.Rademacher(), "estimator": zoext.ForwardDifference(samples=3)},
    {"estimator": zoext.CentralDifference(samples=2), "probe": "inplace"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axes", AXES)
def test_at_any_step(dtype: torch.dtype, axes: dict[str, object]) -> None:
    model, optimizer, scheduler = setup(dtype, **axes)
    train(model, optimizer, scheduler, range(8))
    for stop in range(8):
        first = setup(dtype, **axes)
        train(*first, range(stop))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)  # type: ignore[attr-defined]
        file.seek(0)
        second = setup(dtype, **axes)
        for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)  # type: ignore[attr-defined]
        train(*second, range(stop, 8))
        for a, b in zip(model.parameters(), second[0].parameters(), strict=True):
            assert same(a, b)
        assert second[1].state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_state_can_be_loaded_again() -> None:
    model, optimizer, scheduler = setup(torch.float32)
    state = optimizer.state_dict()
    for _ in range(2):
        train(model, optimizer, scheduler, range(2))
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["step"] == 0


def test_a_state_dict_is_a_snapshot_of_plain_data() -> None:
    model, optimizer, scheduler = setup(torch.float32)
    train(model, optimizer, scheduler, range(2))
    state = optimizer.state_dict()
    saved = copy.deepcopy(state)
    train(model, optimizer, scheduler, range(2, 4))
    assert state == saved
    allowed = (int, float, str, bool, list, tuple, dict, type(None))

    def check(value: object) -> None:
        assert isinstance(value, allowed), value
        items = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        )
        for item in items:
            check(item)

    check(state)


def test_another_recipe_is_refused() -> None:
    model, optimizer, _ = setup(torch.float32, direction=zoext.Rademacher())
    other = zoext.MeZO(model, lr=0.5)
    with pytest.raises(ValueError, match=r"Rademacher.*same direction, estimator and update"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("former", "balance"), [("printed", "paper"), ("still", "freeze")])
def test_names_of_earlier_versions_are_read(former: str, balance: str) -> None:
    """Values of options that have been renamed since the state was saved."""
    _, optimizer, _ = setup(torch.float32, direction=zoext.ActivationSubspace(balance=balance))
    recipe = copy.deepcopy(optimizer.param_groups[0]["recipe"])
    state = optimizer.state_dict()
    state["param_groups"][0]["recipe"]["direction"]["balance"] = former
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["recipe"] == recipe
    assert state["param_groups"][0]["recipe"]["direction"]["balance"] == former


PROGRAM = """
import hashlib, torch, zoext
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(50, 400), torch.nn.ReLU(), torch.nn.Linear(400, 10))
x = torch.randn(20, 50)
optimizer = zoext.MeZO(model, lr=1e-2, seed=77)
for _ in range(5):
    optimizer.step(lambda: model(x).square().mean())
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


def test_two_processes_agree() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 65
