"""A disk that takes no more stops a run before a weight moves, and loses none of its lines."""

from __future__ import annotations

import copy
import errno
import gc
import os
import threading
from pathlib import Path

import pytest
import torch

import zoext
from support.faulty_runs import FaultyRun
from support.graphed_runs import Run, same
from support.recorded_graph import RecordedGraph
from support.trajectory_files import assert_replays, steps_in


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes are free on the disk, as the thread sees it."""
    left, real = [10**9], os.write

    def write(file: int, data: bytes) -> int:
        if threading.current_thread().name == "zoext trajectory":
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = bytes(data)[: left[0]]
            left[0] -= len(data)
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    return left


@pytest.mark.parametrize("recipe", ["mezo", "agzo"])
def test_a_full_disk_stops_the_run_before_theta_moves(recipe: str, room: list[int], tmp_path: Path) -> None:
    run, path = FaultyRun(recipe, torch.bfloat16, precision="residual"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    trajectory = zoext.Trajectory(path, run.optimizer, frames=True)
    run.healthy(2)
    trajectory.flush()
    written = path.read_bytes()
    room[0] = 30  # a write that is refused after a part of a line, or of a frame
    run.healthy(2)
    with pytest.raises(OSError, match="No space left") as raised:
        trajectory.flush()
    assert raised.value.errno == errno.ENOSPC
    bits, steps = run.bits(), run.steps
    for _ in range(3):
        with pytest.raises(OSError, match=r"No space left.*no weight was moved.*Make room") as raised:
            run.step()
        assert raised.value.filename == str(path.with_suffix(".frames" if recipe == "agzo" else ".jsonl"))
        assert run.bits() == bits
        assert run.steps == steps
        assert path.read_bytes() == written
    room[0] = 10**9
    run.healthy(2)  # there is room again: nothing was lost
    trajectory.close()
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    assert_replays(base, path, run)


def test_a_full_disk_can_be_left_behind(room: list[int], tmp_path: Path) -> None:
    """The run goes on without the trajectory, or from an earlier checkpoint with it."""
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    trajectory = zoext.Trajectory(path, run.optimizer)
    run.healthy(2)
    trajectory.flush()
    checkpoint = copy.deepcopy(run.state())
    room[0] = 0
    run.step()
    with pytest.raises(OSError, match="No space left"):
        trajectory.close()
    assert run.optimizer.recorder is None
    run.step()
    assert steps_in(path) == [1, 2]
    room[0] = 10**9
    run.model.load_state_dict(checkpoint[0])
    run.optimizer.load_state_dict(checkpoint[1])
    with zoext.Trajectory(path, run.optimizer, resume=True):
        run.healthy(2)
    assert steps_in(path) == [1, 2, 3, 4]
    assert_replays(base, path, run)


def test_closing_when_there_is_room_again_writes_the_rest(room: list[int], tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    trajectory = zoext.Trajectory(path, run.optimizer)
    room[0] = 5
    run.healthy(3)
    with pytest.raises(OSError, match="No space left"):
        trajectory.flush()
    room[0] = 10**9
    trajectory.close()
    assert steps_in(path) == [1, 2, 3]


def test_a_close_that_was_refused_can_be_tried_again(
    room: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    trajectory = zoext.Trajectory(path, run.optimizer)
    room[0] = 0
    run.healthy(3)
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            trajectory.close()
    with pytest.raises(OSError, match="No space left"):
        trajectory.flush()
    room[0] = 10**9
    trajectory.close()
    trajectory.close()
    assert steps_in(path) == [1, 2, 3]
    assert_replays(base, path, run)
    assert not capsys.readouterr().err


def test_what_is_lost_with_a_forgotten_trajectory_is_told_once(
    room: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for closed in (True, False):
        run, path = FaultyRun("mezo"), tmp_path / f"{closed}.jsonl"
        trajectory = zoext.Trajectory(path, run.optimizer)
        thread = trajectory._writer._thread
        room[0] = 0
        run.healthy(3)
        if closed:
            with pytest.raises(OSError, match="No space left"):
                trajectory.close()
        del run, trajectory
        gc.collect()
        thread.join(30)
        assert not thread.is_alive()
        told = f"zoext: {path}: No space left on device; its last steps are lost: 3 of them\n"
        assert capsys.readouterr().err == ("" if closed else told)


def test_what_the_block_raised_comes_first(room: list[int], tmp_path: Path) -> None:
    run = FaultyRun("mezo")

    def block() -> None:
        with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer):
            room[0] = 0
            run.step()
            raise KeyError

    with pytest.raises(KeyError) as raised:
        block()
    assert "No space left" in raised.value.__notes__[0]
    assert run.optimizer.recorder is None


def test_a_part_of_a_line_that_could_not_be_removed_is_removed_later(
    room: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    with zoext.Trajectory(path, run.optimizer) as trajectory, monkeypatch.context() as patch:
        run.step()
        trajectory.flush()
        room[0] = 30
        real, refusals = os.ftruncate, []

        def ftruncate(file: int, size: int) -> None:
            if not room[0]:
                refusals.append(size)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(file, size)

        patch.setattr(os, "ftruncate", ftruncate)
        run.step()
        with pytest.raises(OSError, match="No space left"):
            trajectory.flush()
        assert refusals
        assert steps_in(path) == [1]  # the rest is torn
        room[0] = 10**9
        run.step()
    assert steps_in(path) == [1, 2, 3]


def test_a_full_disk_and_a_graph(room: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoext.graphs.graphed_step.CudaGraph", RecordedGraph)
    run = Run("mezo")
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer) as trajectory:
        run.steps(range(6))
        room[0] = 0
        run.step(6)
        with pytest.raises(OSError, match="No space left"):
            trajectory.flush()
        before = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()])
        with pytest.raises(OSError, match="no weight was moved"):
            run.step(7)
        assert same([run.model.state_dict(), run.optimizer.state_dict()], before)
        room[0] = 10**9
        run.step(7)
    assert steps_in(tmp_path / "run.jsonl") == list(range(1, 9))
