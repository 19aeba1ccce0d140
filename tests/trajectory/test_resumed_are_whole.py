"""A trajectory that is resumed ends with the bytes of one that was never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import zoext

STEPS = 7


def prepared(name: str) -> tuple[nn.Module, zoext.ZerothOrderOptimizer]:
    generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model[0].bias.requires_grad_(False)
    return model, getattr(zoext, name)(model, lr=0.01, mu=0.002, weight_decay=0.1, seed=9)


def take(model: nn.Module, optimizer: zoext.ZerothOrderOptimizer, steps: range) -> None:
    for step in steps:
        if step == 5:  # so that a setting changes after the point where a run was resumed, too
            optimizer.param_groups[0]["weight_decay"] = 0.2
        optimizer.step(lambda: model(torch.ones(3, 5)).square().mean())


@pytest.mark.parametrize("name", ["MeZO", "AdaMeZO", "AGZO", "LOZO"])
@pytest.mark.parametrize("resumed_at", [0, 3, 6])
def test_resumed(tmp_path: Path, name: str, resumed_at: int) -> None:
    model, optimizer = prepared(name)
    with zoext.Trajectory(tmp_path / "whole.jsonl", optimizer, frames=True):
        take(model, optimizer, range(STEPS))

    model, optimizer = prepared(name)
    with zoext.Trajectory(tmp_path / "parts.jsonl", optimizer, frames=True):
        take(model, optimizer, range(resumed_at))
        saved = optimizer.state_dict()
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        take(model, optimizer, range(resumed_at, STEPS - 1))
    model, optimizer = prepared(name)
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    with zoext.Trajectory(tmp_path / "parts.jsonl", optimizer, frames=True, resume=True):
        take(model, optimizer, range(resumed_at, STEPS))
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    if name == "AGZO":
        assert (tmp_path / "parts.frames").read_bytes() == (tmp_path / "whole.frames").read_bytes()
