"""Two runs never write one trajectory, and no run writes one that is not at its path any more."""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest

import zoext
from support.faulty_runs import FaultyRun
from support.graphed_runs import same
from zoext._runtime import atomic
from zoext.trajectory._format.lines import read


def steps_in(path: Path) -> list[int]:
    return [line.record["step"] for line in read(path)][1:]


@pytest.mark.parametrize("links", [True, False])
def test_two_runs_that_begin_at_once(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one begins when this one has seen that there is no file."""
    path, real = tmp_path / "run.jsonl", atomic.create_text
    first, second = FaultyRun("mezo"), FaultyRun("mezo", seed=1)
    trajectories = []

    def create_text(path: Path, text: str) -> None:
        monkeypatch.setattr(atomic, "create_text", real)
        trajectories.append(zoext.Trajectory(path, second.optimizer))
        real(path, text)

    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(atomic, "create_text", create_text)
    with pytest.raises(FileExistsError):
        zoext.Trajectory(path, first.optimizer)
    assert first.optimizer.recorder is None
    second.healthy(3)
    trajectories[0].close()
    assert steps_in(path) == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_what_a_killed_process_left_is_not_written_into(tmp_path: Path) -> None:
    """It may be a second name of the trajectory of that process."""
    (tmp_path / "precious").write_text("precious")
    os.link(tmp_path / "precious", tmp_path / f".run.jsonl.{os.getpid()}.tmp")
    zoext.Trajectory(tmp_path / "run.jsonl", FaultyRun("mezo").optimizer).close()
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("recipe", ["mezo", "agzo"])
def test_a_second_recording_is_refused_at_once(recipe: str, tmp_path: Path) -> None:
    run, path = FaultyRun(recipe), tmp_path / "run.jsonl"
    with zoext.Trajectory(path, run.optimizer, frames=True) as trajectory:
        run.healthy(3)
        trajectory.flush()
        written = path.read_bytes()
        other = FaultyRun(recipe)
        other.healthy(2)
        for _ in range(2):
            with pytest.raises(BlockingIOError, match="another recording") as raised:
                zoext.Trajectory(path, other.optimizer, frames=True, resume=True)
            assert raised.value.filename == str(path)
        assert path.read_bytes() == written
        run.step()
    with zoext.Trajectory(path, other.optimizer, frames=True, resume=True):
        other.step()
    assert steps_in(path) == [1, 2, 3]


def test_somebody_who_writes_without_asking_is_told_of(tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    trajectory = zoext.Trajectory(path, run.optimizer)
    run.step()
    trajectory.flush()
    with path.open("a") as file:
        file.write("graffiti")
    run.step()
    for action in (trajectory.flush, run.step, trajectory.close):
        with pytest.raises(OSError, match="another program"):
            action()
    with pytest.raises(OSError, match=r"Fix this and step again|another program"):
        trajectory.flush()
    assert run.steps == 2
    assert path.read_bytes().endswith(b"}\ngraffiti")
    os.truncate(path, path.stat().st_size - len("graffiti"))
    trajectory.close()
    assert steps_in(path) == [1, 2]


@pytest.mark.parametrize("fate", ["moved", "removed", "replaced"])
def test_a_file_that_is_not_at_its_path_any_more(fate: str, tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    trajectory = zoext.Trajectory(path, run.optimizer)
    run.step()
    trajectory.flush()
    os.link(path, tmp_path / "aside")
    path.unlink()
    if fate == "replaced":
        path.write_bytes((tmp_path / "aside").read_bytes())
    run.step()
    bits = run.bits()
    for action in (trajectory.flush, run.step, trajectory.close):
        with pytest.raises(OSError, match="moved, removed or replaced") as raised:
            action()
        assert raised.value.filename == str(path)
    assert run.bits() == bits
    run.step()  # without a trajectory
    if fate == "moved":
        (tmp_path / "aside").replace(path)
        trajectory.close()
        zoext.replay(base, path, to_step=1)


def test_a_file_that_cannot_be_locked_is_recorded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    with zoext.Trajectory(path, run.optimizer):
        run.healthy(2)
    assert steps_in(path) == [1, 2]


def test_a_close_that_failed_lets_go_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, path, real = FaultyRun("mezo"), tmp_path / "run.jsonl", os.write
    first = zoext.Trajectory(path, run.optimizer)
    state = copy.deepcopy(run.state())

    def write(file: int, data: bytes) -> int:
        if threading.current_thread().name == "zoext trajectory":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        run.healthy(2)
        with pytest.raises(OSError, match="No space"):
            first.close()
    other = FaultyRun("mezo")
    with zoext.Trajectory(path, other.optimizer, resume=True) as second:
        other.step()
        second.flush()
        with pytest.raises(BlockingIOError):
            first.close()
    with pytest.raises(OSError, match="another program"):
        first.close()
    assert steps_in(path) == [1]
    assert same(state, FaultyRun("mezo").state())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: of forking with threads
def test_a_worker_that_outlives_a_killed_run_does_not_keep_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        trajectory = zoext.Trajectory(path, FaultyRun("mezo").optimizer)
        if os.fork():
            signal.pause()
        os.close(done[1])
        os.write(ready[1], b"worker")
        os.read(done[0], 1)
        del trajectory
        os._exit(0)
    os.read(ready[0], 6)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run = FaultyRun("mezo")
    with zoext.Trajectory(path, run.optimizer, resume=True):
        run.step()
    assert steps_in(path) == [1]
    for end in (*ready, *done):
        os.close(end)  # the worker ends
