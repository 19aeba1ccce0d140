"""No more than the last second of a run is lost, whatever happens to its process."""

from __future__ import annotations

import copy
import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import zoext
from support import environment
from support.faulty_runs import FaultyRun
from support.trajectory_files import assert_replays, steps_in

# All processes are forks of one that has imported everything, and run side by side.
PARENT = """
import json, os, signal, sys, time
import torch
from support.faulty_runs import FaultyRun
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
    folder = tmp_path_factory.mktemp("processes")
    paths = {name: folder / f"{name}.jsonl" for name in SCENARIOS}
    scenarios = [[str(paths[name]), *scenario] for name, scenario in SCENARIOS.items()]
    parent = subprocess.run(
        [sys.executable, "-c", PARENT],
        input=json.dumps(scenarios),
        env=environment(OMP_NUM_THREADS="1"),
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


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """As the processes have: on some processors a matrix product depends on the number of threads."""
    set_threads(1)


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


def test_a_fork_that_goes_its_own_way(outcomes: dict[str, Outcome]) -> None:
    path, code, _, err = outcomes["forking"]
    assert code == 0, err
    run = FaultyRun("mezo")
    base = copy.deepcopy(run.model)
    run.healthy(5)
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert_replays(base, path, run)
