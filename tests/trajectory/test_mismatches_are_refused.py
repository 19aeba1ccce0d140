"""A trajectory that does not match its target raises a TrajectoryError, and nothing changes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import zoext
from support.faulty_runs import FaultyRun
from support.graphed_runs import same
from support.trajectory_files import forge, record, record_mezo, refused
from zoext.trajectory import TrajectoryError
from zoext.trajectory._format import header


@pytest.fixture
def run(tmp_path: Path) -> tuple[nn.Module, Path]:
    return record_mezo(tmp_path / "run.jsonl")


def test_another_model(run: tuple[nn.Module, Path]) -> None:
    base, path = run
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    refused(other, path, f"{path}: model mismatch: '2.weight' (", "is not in this model")
    wide = copy.deepcopy(base)
    wide[3] = nn.Linear(4, 5)
    refused(wide, path, "model mismatch: 3.weight is float32 [5, 4], not float32 [3, 4]")
    refused(copy.deepcopy(base).half(), path, "0.weight is float16 [4, 3], not float32 [4, 3]")
    with torch.no_grad():
        base[0].bias[2] = torch.nextafter(base[0].bias[2], torch.tensor(9.0))
    refused(base, path, "weights mismatch: 0.bias has other weights (1 of")


def test_weights_that_differ_in_the_sign_of_a_zero(run: tuple[nn.Module, Path]) -> None:
    base, path = run
    with torch.no_grad():
        base[2].special[0] = 0.0
    refused(base, path, "2.special has other weights")


def test_an_optimizer_that_is_not_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, recipe="lozo", dtype=torch.bfloat16, precision="residual")
    for recipe, options, message in [
        ("mezo", {"precision": "residual"}, "its recipe is"),
        ("lozo", {"precision": "nearest"}, "its precision is residual, but the optimizer has nearest"),
        ("lozo", {"precision": "residual", "seed": 7}, "its seed is"),
    ]:
        other = FaultyRun(recipe, torch.bfloat16, **options)
        refused(other.optimizer, path, message)
    moved = FaultyRun("lozo", torch.bfloat16, precision="residual")
    moved.step()
    refused(moved.optimizer, path, "its step is 0, but the optimizer has 1")
    fresh = FaultyRun("lozo", torch.bfloat16, precision="residual")
    moved.optimizer.param_groups[0]["step"] = 0
    moved.model.load_state_dict(fresh.model.state_dict())
    refused(moved.optimizer, path, "the next step of this one depends on its earlier steps")
    groups = [{"params": list(part.parameters())} for part in fresh.model]
    apart = zoext.ZerothOrderOptimizer(
        groups,
        direction=zoext.LowRank(rank=2, refresh_interval=3),
        seed=2**64 - 5,
        precision="residual",
        probe=zoext.StreamedProbe(fresh.model),
    )
    refused(
        apart,
        path,
        "model mismatch: the run had parameter groups of [8] ",
        "optimizer has [2, 2, 2, 2]",
    )


def test_several_of_which_one_does_not_fit(run: tuple[nn.Module, Path], tmp_path: Path) -> None:
    base, path = run
    other = tmp_path / "other.jsonl"
    shutil.copy(path, other)
    forge(other, 1, lambda row: row["groups"][0]["parameters"][0].update(digest="0" * 32))
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(TrajectoryError, match=r"weights mismatch: .* has other weights"):
        zoext.replay(base, [path, other])
    assert same(base.state_dict(), before)
    assert not base[3].bias.requires_grad


@pytest.mark.parametrize("field", ["version", "noise_field"])
@pytest.mark.parametrize("packages", [{"zoext": "9.1"}, {}, {"zoext": [7]}, "strange", None])
def test_a_later_version(run: tuple[nn.Module, Path], field: str, packages: object) -> None:
    base, path = run
    known = getattr(header, field.upper())
    forge(
        path, 1, lambda row: row.update({field: known + 1, "packages": packages, "groups": "of another kind"})
    )
    error = refused(
        base, path, f"{path}: line 1: {field} is {known + 1}", f"this zoext reads {known}", "install"
    )
    assert ("9.1" in str(error)) == (packages == {"zoext": "9.1"})


def test_the_version_that_is_read_is_the_one_that_is_written() -> None:
    assert (header.VERSION, header.NOISE_FIELD) == (1, 2)


def test_only_the_run_itself_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    _, run = record(path, recipe="lozo")
    data = path.read_bytes()
    for recipe, options in [("mezo", {}), ("lozo", {"seed": 1}), ("lozo", {"precision": "nearest"})]:
        with pytest.raises(TrajectoryError, match="run mismatch: its "):
            zoext.Trajectory(path, FaultyRun(recipe, **options).optimizer, resume=True)
    with pytest.raises(TrajectoryError, match="model mismatch: "):
        zoext.Trajectory(path, FaultyRun("lozo", torch.bfloat16).optimizer, resume=True)
    assert path.read_bytes() == data
    with zoext.Trajectory(path, run.optimizer, resume=True):
        run.step()
