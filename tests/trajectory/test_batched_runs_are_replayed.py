"""Seeds and coefficients say all of a batched run: a replay has its bits, and so has the same run again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import zoext
from support.batched_models import PLAIN, plain
from support.oracle import bits

RECIPES = {
    "mezo": lambda model, probe: zoext.MeZO(model, lr=1e-3, samples=2, seed=7, probe=probe),
    "lozo": lambda model, probe: zoext.LOZO(model, lr=1e-3, refresh_interval=2, seed=7, probe=probe),
    "agzo": lambda model, probe: zoext.AGZO(model, lr=1e-3, rank=2, seed=7, probe=probe),
    "gv": lambda model, probe: zoext.MeZOGV(model, lr=1e-3, pool_size=5, seed=7, probe=probe),
}


def run(recipe: str, most: int | None, dtype: torch.dtype, path: Path | None = None) -> nn.Module:
    model, losses = plain(PLAIN["mixed"], dtype)
    optimizer = RECIPES[recipe](model, zoext.BatchedProbe(model, max_copies=most))
    torch.manual_seed(4)
    if path is None:
        for _ in range(4):
            optimizer.step(lambda copies: losses(copies).float())
        return model
    with zoext.Trajectory(path, optimizer, frames=recipe == "agzo"):
        for _ in range(4):
            optimizer.step(lambda copies: losses(copies).float())
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits(tmp_path: Path, recipe: str, dtype: torch.dtype) -> None:
    path = tmp_path / "run.jsonl"
    trained = run(recipe, 3, dtype, path)
    assert same(trained, run(recipe, 3, dtype))
    start, _ = plain(PLAIN["mixed"], dtype)
    assert not same(trained, start)
    zoext.replay(start, path)
    assert same(trained, start)
