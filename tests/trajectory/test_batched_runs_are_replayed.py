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


@pytest.mark.parametrize("recipe", ["mezo", "lozo"])
def test_training_continues_with_batched_probes(tmp_path: Path, recipe: str) -> None:
    """A run of eight steps, and one of four whose replay takes four more."""
    path = tmp_path / "run.jsonl"
    run(recipe, None, torch.float32, path)
    whole, losses = plain(PLAIN["mixed"], torch.float32)
    continued, others = plain(PLAIN["mixed"], torch.float32)
    optimizer = RECIPES[recipe](whole, "batched")
    replayed = zoext.replay(continued, path, probe="batched")
    assert isinstance(replayed.probe, zoext.BatchedProbe)
    torch.manual_seed(4)
    for _ in range(8):
        optimizer.step(losses)
    torch.manual_seed(4)
    for _ in range(4):  # whose random numbers the replay did not draw
        zoext.MeZO(continued, lr=0.0, probe="batched").estimate(others)
    for _ in range(4):
        replayed.step(others)
    assert same(continued, whole)


def test_other_probes_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run("mezo", None, torch.float32, path)
    model, losses = plain(PLAIN["mixed"], torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"probe must be 'auto', .*, not 'together'"):
        zoext.replay(model, path, probe="together")
    with pytest.raises(ValueError, match="probe='batched': the optimizer that is the target has one; leave"):
        zoext.replay(RECIPES["mezo"](model, "streamed"), path, probe="batched")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    probe = zoext.BatchedProbe(model, max_copies=2)
    replayed = zoext.replay(model, path, probe=probe)
    assert replayed.probe is probe
    replayed.step(losses)


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
