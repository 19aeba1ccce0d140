"""What was recorded on one device is replayed on the other to the same bits, residuals and state included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import zoext
from support.cuda_comparison import MARKS
from support.faulty_runs import NAMED
from support.graphed_runs import Run, same
from support.trajectory_files import record, records

pytestmark = MARKS

KINDS = [
    (torch.float32, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "residual"),
    (torch.float16, "stochastic"),
    (torch.float16, "residual"),
]
STEPS = 5


def left_by(optimizer: zoext.ZerothOrderOptimizer) -> tuple[list[Tensor], Any]:
    """Weights and all that a further step depends on, on the CPU."""
    weights = [tensor.detach().cpu() for group in optimizer.param_groups for tensor in group["params"]]
    return weights, tree_map_only(Tensor, Tensor.cpu, optimizer.state_dict())


def require_frames(recipe: str) -> None:
    if recipe == "agzo":
        pytest.importorskip("safetensors", reason="the frames of a trajectory are written with it")


@pytest.mark.parametrize("recipe", NAMED)
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_from_the_cpu_to_cuda(recipe: str, dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    require_frames(recipe)
    base, run = record(tmp_path / "run.jsonl", STEPS, recipe, dtype, precision=precision)
    for to_step in (2, STEPS):
        here, there = copy.deepcopy(base), copy.deepcopy(base).cuda()
        replayed = [zoext.replay(model, tmp_path / "run.jsonl", to_step=to_step) for model in (here, there)]
        assert same(*map(left_by, replayed))
    assert same([tensor.cpu() for tensor in there.parameters()], list(run.model.parameters()))


@pytest.mark.parametrize("recipe", NAMED)
@pytest.mark.parametrize("precision", ["stochastic", "residual"])
def test_from_cuda_to_the_cpu(recipe: str, precision: str, tmp_path: Path) -> None:
    require_frames(recipe)
    run = Run(recipe, graphed=False, device="cuda", dtype=torch.bfloat16, precision=precision)
    base, path = copy.deepcopy(run.model).cpu(), tmp_path / "run.jsonl"
    with zoext.Trajectory(path, run.optimizer, frames=True):
        run.steps(range(STEPS))
    assert len(records(path)) == 1 + STEPS
    replayed = zoext.replay(base, path)
    there, here = map(left_by, (run.optimizer, replayed))
    assert same(there[0], here[0])
    assert same(there[1]["state"], here[1]["state"])
