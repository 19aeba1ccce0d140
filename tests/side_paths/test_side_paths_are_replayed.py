"""Seeds and coefficients reproduce the factors of side paths, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoext
from support.side_paths import filled, losses, model

RECIPES: dict[str, Any] = {
    "MeZO": lambda built: zoext.MeZO(built, lr=0.02, mu=1e-2, weight_decay=0.1, probe="batched"),
    "LOZO": lambda built: zoext.LOZO(built, lr=0.02, rank=2, refresh_interval=3, probe="batched"),
    "AGZO": lambda built: zoext.AGZO(built, lr=0.02, rank=2, mask=None, probe="batched"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_replay(recipe: str, tmp_path: Path) -> None:
    if recipe == "AGZO":
        pytest.importorskip("safetensors", reason="frames of a trajectory need safetensors")
    run = model()
    paths = zoext.attach_side_paths(run, 4, seed=6)
    optimizer = RECIPES[recipe](run)
    with zoext.Trajectory(tmp_path / "run.jsonl", optimizer, frames=recipe == "AGZO"):
        for _ in range(5):
            optimizer.step(lambda copies: losses(run, copies))

    replayed = model()
    again = zoext.attach_side_paths(replayed, 4, seed=6)
    zoext.replay(replayed, tmp_path / "run.jsonl")
    assert all(path.up.weight.abs().min() > 0 for path in paths.values())
    for name, path in paths.items():
        assert torch.equal(again[name].down.weight, path.down.weight)
        assert torch.equal(again[name].up.weight, path.up.weight)


def test_a_state_is_loaded() -> None:
    built, other = model(), model()
    filled(zoext.attach_side_paths(built, 4, seed=6))
    zoext.attach_side_paths(other, 4, seed=7)
    other.load_state_dict(built.state_dict())
    assert torch.equal(losses(other), losses(built))
