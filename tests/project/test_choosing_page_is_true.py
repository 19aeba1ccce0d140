"""The table of docs/choosing.md has every optimizer of the command, its forwards, its state and its lr."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoext.cli._problem.optimizers import OPTIMIZERS

PAGE = Path(__file__).parents[2] / "docs" / "choosing.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")

#: Inputs of the linear layers of the model below.
INPUTS = 6 + 8


def rows() -> dict[str, list[str]]:
    table = PAGE.read_text().split("## The methods")[1].split("\n## ")[0]
    found = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", table, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in found}


def test_all_optimizers_are_there() -> None:
    assert list(rows()) == list(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_row(name: str) -> None:
    _, forwards, state, lr, _ = rows()[name]
    method = OPTIMIZERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        x = torch.randn(5, 6)
    optimizer = method.make(model, lr=1e-4, mu=1e-3, seed=0)
    for _ in range(12):  # more than a window
        optimizer.step(lambda: model(x).square().mean())
    kept = [
        leaf for leaf in tree_leaves(optimizer.param_groups[0]["update_state"]) if isinstance(leaf, Tensor)
    ]
    assert int(forwards) == method.forwards == optimizer.last_estimate.forwards
    assert float(lr) == method.lr_scale
    constant, _, per_input = state.partition(" + ")
    expected = int(constant) + int(per_input.removesuffix(" d_in") or 0) * INPUTS
    assert sum(leaf.numel() * leaf.element_size() for leaf in kept) == expected
