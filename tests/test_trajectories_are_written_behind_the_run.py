"""No step waits for the disk, and no more than the last second is lost, whatever happens to the process."""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from faulty_runs import NAMED, FaultyRun
from graphed_runs import Run, same
from recorded_graph import RecordedGraph
from torch import nn
from trajectory_files import records

import zoext
from zoext.trajectory import recording, writer
from zoext.trajectory.lines import read
from zoext.trajectory.owned import OwnedFile
from zoext.trajectory.writer import BackgroundWriter


def steps_in(path: Path) -> list[int]:
    """The steps that a file has whole and undamaged."""
    return [line.record["step"] for line in read(path)][1:]


def assert_replays(base: nn.Module, path: Path, run: FaultyRun) -> None:
    model = copy.deepcopy(base)
    zoext.replay(model, path)
    assert same(dict(model.named_parameters()), dict(run.model.named_parameters()))


# A slow disk


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
    time.sleep(2 * writer.INTERVAL)  # the thread has begun to write
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
    real = recording.lines.encode

    def encode(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return real(*args)

    trajectory = zoext.Trajectory(path, run.optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording.lines, "encode", encode)
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


# Processes of their own: all are forks of one that has imported everything, and run side by side

PARENT = """
import json, os, signal, sys, time
sys.path.insert(0, "tests")
import torch
from faulty_runs import FaultyRun
import zoext

def begin(path, recipe, program):
    number = os.fork()
    if not number:
        for name, file in (("out", 1), ("err", 2)):
            os.dup2(os.open(path + "." + name, os.O_WRONLY | os.O_CREAT), file)
        run = FaultyRun(recipe)
        trajectory = zoext.Trajectory(path, run.optimizer, frames=True)
        variables = {**globals(), "path": path, "run": run, "trajectory": trajectory}
        del run, trajectory
        exec(program, variables)
        sys.exit(0)
    return number

for recipe in ("mezo", "agzo"):
    FaultyRun(recipe).step()  # imports what it needs
import safetensors.torch
numbers = {begin(*scenario): scenario[0] for scenario in json.load(sys.stdin)}
codes = {}
deadline = time.monotonic() + 60
while numbers:
    number, status = os.waitpid(-1, os.WNOHANG)
    if number:
        codes[numbers.pop(number)] = os.waitstatus_to_exitcode(status)
    for number, path in numbers.items():
        if os.path.exists(path + ".kill") or time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
    time.sleep(0.001)
print(json.dumps(codes))
"""

ENDLESS = """
begin = time.monotonic()
while True:
    run.step()
    now = time.monotonic()
    print(run.steps, now, flush=True)
    if now - begin > 1.8:
        open(path + ".kill", "w").close()
"""

LIMITED = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 2000, resource.RLIM_INFINITY))
refused = None
while refused is None:
    bits, steps = run.bits(), run.steps
    try:
        run.step()
        time.sleep(0.02)
    except OSError as error:
        refused = error
assert run.bits() == bits and run.steps == steps
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for line in open(path, "rb"):
    assert line.endswith(b"}\\n")
print(refused.errno, refused.filename, steps, flush=True)
run.step()
"""

READ_ONLY = """
import tempfile
folder = tempfile.mkdtemp(dir="/tmp")
os.chmod(folder, 0o555)
if os.getuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
other = FaultyRun("mezo")
try:
    zoext.Trajectory(folder + "/run.jsonl", other.optimizer)
except PermissionError:
    other.step()
    print("refused", os.listdir(folder), flush=True)
finally:
    if os.getuid() == 0:
        os.seteuid(0)
    os.rmdir(folder)
"""

FORKING = """
for _ in range(3):
    run.step()
number = os.fork()
if not number:
    for action in (run.step, trajectory.flush):
        try:
            action()
        except RuntimeError as error:
            assert "fork" in str(error), error
        else:
            os._exit(8)
    assert run.steps == 3
    trajectory.close()
    run.step()  # without a trajectory it may
    import gc
    del run, trajectory
    gc.collect()
    sys.exit(7)  # and what is done at the exit of an interpreter
assert os.waitpid(number, 0)[1] == 7 << 8
for _ in range(2):
    run.step()
"""

FULL = """
real = os.write

def write(file, data):
    if file > 2:
        raise OSError(28, os.strerror(28))
    return real(file, data)

run.step()
trajectory.flush()
os.write = write
run.step()
run.step()
"""

# Ctrl-C comes while all waits for a slow disk, and nobody closes the trajectory again.
INTERRUPTED = """
import threading
real = os.fsync

def fsync(file):
    time.sleep(0.6)
    real(file)

os.fsync = fsync
run.step()
timer = threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
timer.start()
try:
    trajectory.close()
except KeyboardInterrupt:
    print("interrupted", flush=True)
timer.join()
"""

FIVE = "for _ in range(5): run.step()\n"
SCENARIOS = {
    "killed": ("mezo", ENDLESS),
    "killed with frames": ("agzo", ENDLESS),
    "ends": ("mezo", FIVE),
    "exits": ("mezo", FIVE + "sys.exit(3)"),
    "fails": ("mezo", FIVE + "1 / 0"),
    "forgets": ("mezo", FIVE + "del trajectory, run"),
    "limited": ("mezo", LIMITED),
    "read-only": ("mezo", READ_ONLY),
    "forking": ("mezo", FORKING),
    "full": ("mezo", FULL),
    "interrupted": ("mezo", INTERRUPTED),
}


class Outcome(NamedTuple):
    path: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder, root = tmp_path_factory.mktemp("processes"), Path(__file__).parents[1]
    paths = {name: folder / f"{name}.jsonl" for name in SCENARIOS}
    scenarios = [[str(paths[name]), *scenario] for name, scenario in SCENARIOS.items()]
    parent = subprocess.run(
        [sys.executable, "-c", PARENT],
        input=json.dumps(scenarios),
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert parent.returncode == 0, parent.stderr
    codes = json.loads(parent.stdout)
    return {
        name: Outcome(path, codes[str(path)], *(Path(f"{path}.{end}").read_text() for end in ("out", "err")))
        for name, path in paths.items()
    }


@pytest.mark.parametrize(("name", "recipe"), [("killed", "mezo"), ("killed with frames", "agzo")])
def test_kill_loses_no_more_than_the_last_second(
    name: str, recipe: str, outcomes: dict[str, Outcome]
) -> None:
    path, code, out, _ = outcomes[name]
    assert code == -signal.SIGKILL
    taken = {int(step): float(moment) for step, moment in map(str.split, out.splitlines(keepends=True)[:-1])}
    steps, last = steps_in(path), max(taken.values())
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= max(step for step, moment in taken.items() if moment < last - 1)
    run = FaultyRun(recipe)
    base = copy.deepcopy(run.model)
    run.healthy(len(steps))
    assert_replays(base, path, run)
    with zoext.Trajectory(path, run.optimizer, frames=True, resume=True):
        run.healthy(2)
    assert steps_in(path) == list(range(1, len(steps) + 3))
    assert_replays(base, path, run)


@pytest.mark.parametrize(("name", "code"), [("ends", 0), ("exits", 3), ("fails", 1), ("forgets", 0)])
def test_processes_that_end_by_themselves_lose_nothing(
    name: str, code: int, outcomes: dict[str, Outcome]
) -> None:
    """Nobody closes the trajectory."""
    outcome = outcomes[name]
    assert outcome.code == code, outcome.err
    assert not outcome.err or name == "fails"
    assert steps_in(outcome.path) == [1, 2, 3, 4, 5]


def test_the_exit_of_a_process_waits_for_what_an_interrupted_close_left(outcomes: dict[str, Outcome]) -> None:
    path, code, out, err = outcomes["interrupted"]
    assert (code, out, err) == (0, "interrupted\n", "")
    assert steps_in(path) == [1]


def test_what_is_lost_at_the_exit_of_a_process_is_told(outcomes: dict[str, Outcome]) -> None:
    path, code, _, err = outcomes["full"]
    assert code == 0
    assert err == f"zoext: {path}: No space left on device; its last steps are lost: 2 of them\n"
    assert steps_in(path) == [1]


# A full disk


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


def test_a_real_limit_on_the_size_of_files(outcomes: dict[str, Outcome]) -> None:
    path, code, out, err = outcomes["limited"]
    assert code == 0, err
    number, name, steps = out.split()
    assert (int(number), name) == (errno.EFBIG, str(path))
    assert steps_in(path) == list(range(1, int(steps) + 2))
    run = FaultyRun("mezo")
    base = copy.deepcopy(run.model)
    run.healthy(int(steps) + 1)
    assert_replays(base, path, run)


def test_a_folder_that_is_read_only(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["read-only"].out == "refused []\n", outcomes["read-only"].err
    assert outcomes["read-only"].code == 0


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    run = FaultyRun("mezo")
    with pytest.raises(FileNotFoundError):
        zoext.Trajectory(tmp_path / "no" / "run.jsonl", run.optimizer)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        zoext.Trajectory(tmp_path / "file" / "run.jsonl", run.optimizer)
    run.step()


@pytest.mark.parametrize("taken", ["run.jsonl", "run.frames"])
def test_a_path_that_exists(taken: str, tmp_path: Path) -> None:
    (tmp_path / taken).write_text("precious")
    run = FaultyRun("agzo")
    with pytest.raises(FileExistsError, match=rf"{taken} exists; .*resume=True"):
        zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer, frames=True)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(taken, "precious")]
    run.step()


# A writer that is forgotten, and one in a fork


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


def test_a_fork_that_goes_its_own_way(outcomes: dict[str, Outcome]) -> None:
    path, code, _, err = outcomes["forking"]
    assert code == 0, err
    run = FaultyRun("mezo")
    base = copy.deepcopy(run.model)
    run.healthy(5)
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert_replays(base, path, run)


# What may happen in a run


def test_two_trajectories_of_one_optimizer(tmp_path: Path) -> None:
    run = FaultyRun("mezo")
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer):
        with pytest.raises(ValueError, match="recorded already; close"):
            zoext.Trajectory(tmp_path / "other.jsonl", run.optimizer)
        run.step()
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_run_in_pieces_and_after_loading_a_state(tmp_path: Path) -> None:
    run = FaultyRun("lozo", torch.bfloat16)
    run.healthy(2)
    loaded = FaultyRun("lozo", torch.bfloat16)
    loaded.model.load_state_dict(run.model.state_dict())
    loaded.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    base = copy.deepcopy(loaded.model)
    with zoext.Trajectory(tmp_path / "run.jsonl", loaded.optimizer):
        loaded.healthy(2)
    model = copy.deepcopy(base)
    assert zoext.replay(model, tmp_path / "run.jsonl").param_groups[0]["step"] == 4
    assert same(dict(model.named_parameters()), dict(loaded.model.named_parameters()))
    with pytest.raises(ValueError, match="to_step must be at least 2"):
        zoext.replay(base, tmp_path / "run.jsonl", to_step=1)


@pytest.mark.parametrize("precision", ["nearest", "residual"])
def test_what_an_optimizer_remembers_must_be_in_the_trajectory(precision: str, tmp_path: Path) -> None:
    run = FaultyRun("adamezo" if precision == "nearest" else "mezo", torch.bfloat16, precision=precision)
    run.healthy(2)
    with pytest.raises(ValueError, match="at step 2 it remembers steps"):
        zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer)
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names it, and nothing that is internal."""
    monkeypatch.chdir(tmp_path)
    optimizer = FaultyRun("mezo").optimizer
    for path in ("", ".", tmp_path):
        with pytest.raises(IsADirectoryError, match=r"path must be a file") as raised:
            zoext.Trajectory(path, optimizer)
        assert raised.value.filename == str(Path(path))
    missing = tmp_path / "none" / "run.jsonl"
    with pytest.raises(FileNotFoundError, match=f"its folder {missing.parent} is missing") as raised:
        zoext.Trajectory(missing, optimizer)
    assert raised.value.filename == str(missing)
    for name in ("x" * 255, "x" * 300):  # a name that is as long as can be, and one that is longer
        with pytest.raises(OSError, match="too long") as raised:
            zoext.Trajectory(tmp_path / name, optimizer)
        assert raised.value.filename == str(tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert optimizer.recorder is None


@pytest.mark.parametrize("recipe", ["mezo", "adamezo"])
def test_a_replay_in_mid_run_is_refused(recipe: str, tmp_path: Path) -> None:
    path, run = tmp_path / "run.jsonl", FaultyRun(recipe)
    with zoext.Trajectory(path, run.optimizer):
        run.healthy(2)
    other = FaultyRun(recipe)
    with zoext.Trajectory(tmp_path / "other.jsonl", other.optimizer):
        before = copy.deepcopy(other.state())
        with pytest.raises(RuntimeError, match=r"replay: the steps.*close\(\)"):
            zoext.replay(other.optimizer, path)
        assert same(other.state(), before)
        other.healthy(1)
    assert steps_in(tmp_path / "other.jsonl") == [1]


@pytest.mark.parametrize("recipe", ["mezo", "adamezo"])
def test_loading_a_state_in_mid_run_is_refused(recipe: str, tmp_path: Path) -> None:
    """Also one of the same step, which no line would show."""
    run, path = FaultyRun(recipe), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    other = FaultyRun(recipe, seed=99)
    with zoext.Trajectory(path, run.optimizer) as trajectory:
        run.healthy(2)
        other.healthy(2)
        before = copy.deepcopy(run.state())
        with pytest.raises(RuntimeError, match=r"load_state_dict.*close\(\)"):
            run.optimizer.load_state_dict(other.optimizer.state_dict())
        assert same(run.state(), before)
        run.step()
        trajectory.close()
        run.optimizer.load_state_dict(other.optimizer.state_dict())
        run.step()
    assert steps_in(path) == [1, 2, 3]
    zoext.replay(base, path)


def test_adding_a_group_in_mid_run_is_refused(tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    extra = nn.Parameter(torch.ones(2))
    with zoext.Trajectory(path, run.optimizer) as trajectory:
        run.step()
        with pytest.raises(RuntimeError, match=r"add_param_group.*close\(\)"):
            run.optimizer.add_param_group({"params": [("extra", extra)]})
        assert len(run.optimizer.param_groups) == 1
        run.step()
        trajectory.close()
        run.optimizer.add_param_group({"params": [("extra", extra)]})
    assert steps_in(path) == [1, 2]


def test_a_step_number_that_was_changed_by_hand(tmp_path: Path) -> None:
    run = FaultyRun("mezo")
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer):
        run.step()
        run.optimizer.param_groups[0]["step"] = 7
        with pytest.raises(RuntimeError, match="at step 1 when its last step was recorded and is at"):
            run.step()
        run.optimizer.param_groups[0]["step"] = 1
        run.step()


def test_a_step_that_could_not_be_recorded_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file ends before it, instead of having a gap."""
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"

    def fails(*_: object) -> None:
        raise MemoryError("injected")

    with zoext.Trajectory(path, run.optimizer):
        run.step()
        with monkeypatch.context() as patch:
            patch.setattr(recording, "send", fails)
            with pytest.raises(MemoryError):
                run.step()
        with pytest.raises(RuntimeError, match="close"):
            run.step()
    assert steps_in(path) == [1]


def test_a_copy_of_the_optimizer_is_not_recorded(tmp_path: Path) -> None:
    run, path = FaultyRun("adamezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(path, run.optimizer):
        run.healthy(2)
        twin = copy.deepcopy(run)
        assert twin.optimizer.recorder is None
        twin.healthy(5)
        run.healthy(1)
    assert steps_in(path) == [1, 2, 3]
    assert_replays(base, path, run)
    run.healthy(4)
    assert same(run.state(), twin.state())


def test_a_line_of_a_run_with_everything(tmp_path: Path) -> None:
    """Groups of their own lr, mu and decay, a scheduler, tensors as lr, layers frozen and thawed."""
    run = FaultyRun("mezo")
    path = tmp_path / "run.jsonl"
    groups = [
        {"params": list(run.model[0].parameters()), "lr": torch.tensor(0.25), "mu": 0.5},
        {"params": list(run.model[3].parameters()), "lr": torch.tensor(0.125, dtype=torch.float64)},
        {"params": list(run.model[1].parameters()), "weight_decay": 0.25},
    ]
    optimizer = zoext.MeZO(groups, lr=0.5, mu=0.25, probe=zoext.StreamedProbe(run.model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    x, base = torch.ones(4, 3), copy.deepcopy(run.model)
    with zoext.Trajectory(path, optimizer, notes={"what": "everything"}):
        for step in range(5):
            run.model[3].requires_grad_(step != 2)
            optimizer.step(lambda: run.model(x).square().mean())
            scheduler.step()
    header, *steps = records(path)
    assert header["notes"] == {"what": "everything"}
    names = [[parameter["name"] for parameter in group["parameters"]] for group in header["groups"]]
    assert names == [["0.weight", "0.bias"], ["3.weight", "3.bias"], ["1.weight", "1.bias"]]
    assert [row["lr"] for row in steps] == [[0.25 / 2**n, 0.125 / 2**n, 0.5 / 2**n] for n in range(5)]
    assert [row.get("moves") for row in steps] == [[[0, 6]], None, [[0, 2], [4, 6]], [[0, 6]], None]
    assert steps[0]["mu"] == [0.5, 0.25, 0.25]
    assert steps[0]["weight_decay"] == [0.0, 0.0, 0.25]
    zoext.replay(base, path)
    assert same(dict(base.named_parameters()), dict(run.model.named_parameters()))


@pytest.mark.parametrize("recipe", NAMED)
def test_micro_batches(recipe: str, tmp_path: Path) -> None:
    path, run = tmp_path / "run.jsonl", FaultyRun(recipe, torch.bfloat16)
    base, x = copy.deepcopy(run.model), torch.randn(8, 3).bfloat16()
    with zoext.Trajectory(path, run.optimizer, frames=True):
        for _ in range(3):
            for micro in x.split(2):
                run.optimizer.estimate(lambda micro=micro: run.model(micro).float().square().mean())
            run.optimizer.step()
    assert steps_in(path) == [1, 2, 3]
    assert_replays(base, path, run)


@pytest.mark.parametrize("recipe", ["agzo", "adam over agzo", "mezo", "lozo", "adamezo"])
def test_graphed_steps(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoext.graphs.CudaGraph", RecordedGraph)
    files: list[bytes] = []
    for graphed in (True, False):
        run = Run(recipe, graphed=graphed, dtype=torch.bfloat16, precision="residual")
        base, path = copy.deepcopy(run.model), tmp_path / f"{graphed}.jsonl"
        replays = RecordedGraph.replays
        with zoext.Trajectory(path, run.optimizer, frames=True):
            run.steps(range(9))
        assert (RecordedGraph.replays > replays) == graphed
        zoext.replay(base, path)
        assert same(dict(base.named_parameters()), dict(run.model.named_parameters()))
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_a_trajectory_that_begins_after_a_graph_was_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoext.graphs.CudaGraph", RecordedGraph)
    run = Run("agzo")
    run.steps(range(6))
    base, replays = copy.deepcopy(run.model), RecordedGraph.replays
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer, frames=True):
        run.steps(range(6, 10))
    assert RecordedGraph.replays == replays + 4
    zoext.replay(base, tmp_path / "run.jsonl")
    assert same(dict(base.named_parameters()), dict(run.model.named_parameters()))


def test_a_full_disk_and_a_graph(room: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoext.graphs.CudaGraph", RecordedGraph)
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


def test_no_pickle_and_no_text_but_ascii(tmp_path: Path) -> None:
    run = FaultyRun("mezo")
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer, notes={"ünïcode": "☃\u2028"}):
        run.step()
    text = (tmp_path / "run.jsonl").read_bytes()
    assert text.isascii()
    assert json.loads(text.splitlines()[0])["notes"] == {"ünïcode": "☃\u2028"}


@pytest.mark.parametrize("change", ["dtype", "seed"])
def test_what_no_line_tells_of_is_refused(tmp_path: Path, change: str) -> None:
    run = FaultyRun("lozo")
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer):
        run.healthy(2)
        if change == "dtype":
            run.model.to(torch.float64)
        else:
            run.optimizer.param_groups[0]["seed"] = 1
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        with pytest.raises(RuntimeError, match="which no line tells"):
            run.step()
        assert all(map(torch.equal, before, run.model.parameters()))
