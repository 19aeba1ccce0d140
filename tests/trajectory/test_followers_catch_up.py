"""A follower of a run that is still recorded has its weights, bit for bit, whenever it catches up."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import zoext
from support.graphed_runs import Run, same
from support.trajectory_files import forge
from zoext.trajectory import TrajectoryError, VersionError, weights_digest


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [("mezo", "stochastic"), *((name, "residual") for name in ("adamezo", "agzo", "lozo", "adam over lozo"))],
)
def test_bits_of_the_run(recipe: str, precision: str, tmp_path: Path) -> None:
    """One follows from the header on, another begins later."""
    run = Run(recipe, graphed=False, dtype=torch.bfloat16, precision=precision)
    base, path = copy.deepcopy(run.model), tmp_path / "run.jsonl"
    with zoext.Trajectory(path, run.optimizer, frames=True) as trajectory:
        early = zoext.Follower(copy.deepcopy(base), path)
        assert early.step == 0
        for step in range(3):
            run.step(step)
        trajectory.flush()
        late = zoext.Follower(copy.deepcopy(base), path)
        assert (late.step, late.catch_up(), early.catch_up()) == (3, 0, 3)
        for step in (3, 4):
            run.step(step)
        trajectory.flush()
        assert (late.catch_up(), early.catch_up()) == (2, 2)
    assert early.step == late.step == 5
    assert early.checksum == late.checksum == path.read_text()[-11:-3]
    for follower in (early, late):
        assert weights_digest(follower.optimizer) == weights_digest(run.optimizer)
        assert follower.optimizer.param_groups[0]["step"] == 5
        tensors = [tensor for group in follower.optimizer.param_groups for tensor in group["params"]]
        assert same(tensors, list(run.model.parameters()))


def recorded(tmp_path: Path, steps: int = 4) -> tuple[nn.Module, bytes, Path]:
    """The model that a run began with, the bytes of its trajectory, and a path for a copy."""
    run = Run("lozo", graphed=False, dtype=torch.float32, precision="nearest")
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer, notes={"run": "a7"}):
        for step in range(steps):
            run.step(step)
    return base, (tmp_path / "run.jsonl").read_bytes(), tmp_path / "copy.jsonl"


def test_every_cut_of_a_copy(tmp_path: Path) -> None:
    """Bytes arrive in any pieces: a torn line waits, and a line without its newline counts."""
    base, content, path = recorded(tmp_path)
    lines = content.splitlines(keepends=True)
    path.write_bytes(lines[0])
    follower = zoext.Follower(copy.deepcopy(base), path)
    assert follower.header.notes == {"run": "a7"}
    for step, line in enumerate(lines[1:], 1):
        for piece in (line[:37], line[37:-1], line[-1:]):
            with path.open("ab") as file:
                file.write(piece)
            follower.catch_up()
            assert follower.step == (step - 1 if piece == line[:37] else step)
    replayed = copy.deepcopy(base)
    optimizer = zoext.replay(replayed, path)
    assert weights_digest(follower.optimizer) == weights_digest(optimizer)
    assert weights_digest(optimizer) != weights_digest(zoext.replay(base, path, to_step=0))


def test_what_it_refuses(tmp_path: Path) -> None:
    base, content, path = recorded(tmp_path)
    lines = content.splitlines(keepends=True)
    other = copy.deepcopy(base)
    with torch.no_grad():
        name, tensor = list(other.named_parameters())[2]
        tensor.view(-1)[1] += 1e-3
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=f"weights mismatch: {name} has other weights"):
        zoext.Follower(other, path)

    path.write_bytes(b"".join(lines[:3]))
    model = copy.deepcopy(base)
    follower = zoext.Follower(model, path)
    before = copy.deepcopy(parameters(model))
    path.write_bytes(b"".join(lines[:3]) + lines[3].replace(b'"lr":', b'"lR":') + lines[4])
    with pytest.raises(TrajectoryError, match="line 4 has a checksum mismatch"):
        follower.catch_up()
    path.write_bytes(b"".join([*lines[:3], lines[4]]))  # a line is missing
    with pytest.raises(TrajectoryError, match="line 4 has a checksum mismatch"):
        follower.catch_up()
    path.write_bytes(b"".join(lines[:2]))
    with pytest.raises(TrajectoryError, match="was cut"):
        follower.catch_up()
    assert same(parameters(model), before)
    path.write_bytes(content)
    follower.optimizer.step(lambda: model(torch.ones(2, next(model.parameters()).shape[1])).square().mean())
    with pytest.raises(RuntimeError, match="step 3 comes next, but the optimizer is at step 3"):
        follower.catch_up()


def test_another_noise_field_is_refused(tmp_path: Path) -> None:
    base, content, path = recorded(tmp_path, steps=1)
    path.write_bytes(content)
    forge(path, 1, lambda header: header.update(noise_field=3))
    with pytest.raises(VersionError, match="noise_field is 3"):
        zoext.Follower(base, path)
