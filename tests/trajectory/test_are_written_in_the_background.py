"""No step waits for the disk, nor for the thread that writes; a writer that is forgotten still writes."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zoext
from support.faulty_runs import FaultyRun
from support.trajectory_files import assert_replays, records, steps_in
from zoext.trajectory import OwnedFile
from zoext.trajectory._format import lines
from zoext.trajectory._writer import background
from zoext.trajectory._writer.background import BackgroundWriter


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes what it is given when the event is set; os.fsync of other threads is as ever."""
    ready, real = threading.Event(), os.fsync

    def fsync(file: int) -> None:
        if threading.current_thread().name == "zoext trajectory":
            assert ready.wait(30)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    yield ready
    ready.set()


def test_steps_do_not_wait_for_a_slow_disk(disk: threading.Event, tmp_path: Path) -> None:
    """Here the disk takes nothing until the run is over: if a step waited, it would be for ever."""
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    trajectory = zoext.Trajectory(path, run.optimizer)
    run.healthy(3)
    time.sleep(2 * background.INTERVAL)  # the thread has begun to write
    run.healthy(5)
    assert len(steps_in(path)) < 8
    disk.set()
    trajectory.close()
    assert steps_in(path) == list(range(1, 9))
    assert_replays(base, path, run)


def test_flush_and_close_wait(disk: threading.Event, tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    trajectory = zoext.Trajectory(path, run.optimizer)
    for step, wait in enumerate((trajectory.flush, trajectory.flush, trajectory.close), 1):
        disk.clear()
        run.step()
        opens = threading.Timer(0.05, disk.set)
        opens.start()
        wait()
        assert disk.is_set()
        assert steps_in(path) == list(range(1, step + 1))
        opens.join()
    trajectory.close()
    trajectory.flush()


def test_nothing_is_read_from_a_step_before_the_thread_writes_it(tmp_path: Path) -> None:
    """Making a line would wait for the device, so it is the thread's; the learning rate is the step's."""
    run, path = FaultyRun("mezo", lr=torch.tensor(0.5)), tmp_path / "run.jsonl"
    threads = set()
    real = lines.encode

    def encode(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return real(*args)

    trajectory = zoext.Trajectory(path, run.optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "encode", encode)
        for step in range(4):
            run.optimizer.param_groups[0]["lr"].fill_(0.5**step)
            run.step()
        trajectory.close()
    assert threads == {"zoext trajectory"}
    assert [row["lr"] for row in records(path)[1:]] == [[1.0], [0.5], [0.25], [0.125]]


def test_closing_waits_again_after_it_was_interrupted(disk: threading.Event, tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    trajectory = zoext.Trajectory(path, run.optimizer)
    run.healthy(3)
    for _ in range(2):
        ctrl_c = threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
        ctrl_c.start()
        with pytest.raises(KeyboardInterrupt):
            trajectory.close()
        ctrl_c.join()
    threading.Timer(0.2, disk.set).start()
    trajectory.close()
    assert disk.is_set()
    assert steps_in(path) == [1, 2, 3]


def test_a_trajectory_that_is_forgotten_still_writes(disk: threading.Event, tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    zoext.Trajectory(path, run.optimizer)
    thread = next(thread for thread in threading.enumerate() if thread.name == "zoext trajectory")
    run.healthy(3)
    del run
    disk.set()
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    assert steps_in(path) == [1, 2, 3]


def test_garbage_that_the_thread_itself_collects(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.touch()
    written = BackgroundWriter(OwnedFile(path))
    thread, forgotten = written._thread, threading.Event()

    def piece() -> tuple[bytes]:
        assert forgotten.wait(30)
        gc.collect()
        return (b"piece",)

    cycle: list[Any] = [written]
    cycle.append(cycle)
    written.put(piece)
    gc.disable()
    try:
        del written, cycle
        forgotten.set()
        thread.join(30)
    finally:
        gc.enable()
    assert not thread.is_alive()
    assert path.read_bytes() == b"piece"
    assert not capfd.readouterr().err


class Batches(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(index))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: of forking with threads
def test_loaders_that_fork_neither_double_nor_lose_lines(tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(path, run.optimizer):
        for _ in range(2):
            loader = torch.utils.data.DataLoader(
                Batches(), num_workers=2, multiprocessing_context="fork", batch_size=2
            )
            for _ in loader:
                run.step()
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    assert_replays(base, path, run)
