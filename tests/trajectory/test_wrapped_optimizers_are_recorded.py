"""A recording through a wrapper of the optimizer, as trainers make them, is that of the optimizer itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoext
from support.faulty_runs import FaultyRun
from support.graphed_runs import same
from support.trajectory_files import assert_replays, steps_in


class Copying:
    """Copies the attributes of the optimizer and takes its class, like those of Lightning and Fabric."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = {key: value for key, value in vars(optimizer).items() if key != "step"}
        self.__class__ = type("Copying", (Copying, type(optimizer)), {})
        self.optimizer = optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step(closure)


class Forwarding(torch.optim.Optimizer):
    """Forwards some attributes, like that of Accelerate."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)


WRAPPERS = [Copying, Forwarding, lambda optimizer: Forwarding(Copying(optimizer))]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("recipe", ["mezo", "agzo"])
def test_recorded_and_resumed(recipe: str, wrap: Callable[..., Any], tmp_path: Path) -> None:
    run, path = FaultyRun(recipe), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    inner = run.optimizer
    run.optimizer = wrap(inner)
    for resume in (False, True):
        with zoext.Trajectory(path, run.optimizer, frames=True, resume=resume) as trajectory:
            assert inner.recorder is trajectory
            with pytest.raises(ValueError, match="recorded already"):
                zoext.Trajectory(tmp_path / "other.jsonl", inner)
            run.healthy(2)
        assert inner.recorder is None
    assert steps_in(path) == [1, 2, 3, 4]
    assert_replays(base, path, run)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_replayed_on(wrap: Callable[..., Any], tmp_path: Path) -> None:
    recorded, run, path = FaultyRun("adamezo"), FaultyRun("adamezo"), tmp_path / "run.jsonl"
    with zoext.Trajectory(path, recorded.optimizer):
        recorded.healthy(3)
    assert zoext.replay(wrap(run.optimizer), path) is run.optimizer
    weights = [dict(each.model.named_parameters()) for each in (run, recorded)]  # a replay moves no buffer
    assert same(*weights)
    assert same(run.optimizer.state_dict(), recorded.optimizer.state_dict())


@pytest.mark.parametrize("recipe", ["mezo", "adamezo"])
def test_a_recording_that_began_before_the_wrapper(recipe: str, tmp_path: Path) -> None:
    """Accelerate loads the optimizer's own state, moved to its device, when it prepares an optimizer."""
    run, path = FaultyRun(recipe), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(path, run.optimizer):
        run.healthy(3)
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        run.healthy(1)
        other = FaultyRun(recipe).optimizer.state_dict()
        with pytest.raises(RuntimeError, match="load_state_dict: the steps of this optimizer are recorded"):
            run.optimizer.load_state_dict(other)
    assert steps_in(path) == [1, 2, 3, 4]
    assert_replays(base, path, run)


def test_accelerate_prepares_a_recorded_optimizer(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    base, inner = copy.deepcopy(run.model), run.optimizer
    with zoext.Trajectory(path, inner) as trajectory:
        run.optimizer = accelerate.Accelerator(cpu=True).prepare(inner)
        assert inner.recorder is trajectory
        run.healthy(3)
    assert steps_in(path) == [1, 2, 3]
    assert_replays(base, path, run)


def test_the_optimizer_of_torch_is_refused(tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    other = torch.optim.SGD(run.model.parameters())
    with pytest.raises(TypeError, match=r"optimizer must be a ZerothOrderOptimizer or wrap one.*not SGD"):
        zoext.Trajectory(path, other)
    assert not path.exists()
    zoext.Trajectory(path, run.optimizer).close()
    with pytest.raises(TypeError, match=r"optimizer must be a ZerothOrderOptimizer or wrap one.*not SGD"):
        zoext.replay(other, path)
