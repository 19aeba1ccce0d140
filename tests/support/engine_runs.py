"""Runs the examples of inference engines in processes that die, are slow, come late or have another base.

Run as a program with a folder for what they print: NAME.log, and ends.json with their exit statuses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, LATE_FROM = 4, "step 1:"  # in the log of the driver


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > give_up:
            raise TimeoutError(f"nothing came in {seconds} s")
        time.sleep(0.02)
    return found


class Processes:
    """Forks of this process by name, each with a log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, int] = {}

    def start(self, name: str, act: Callable[[], None]) -> None:
        child = os.fork()
        if child:
            self.running[name] = child
            return
        log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 0
        try:
            act()
        except SystemExit as error:
            print(error.code, flush=True)
            status = 1
        except BaseException:
            traceback.print_exc()
            status = 2
        sys.stdout.flush()
        os._exit(status)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def url(self, name: str) -> str:
        return str(wait_for(lambda: [line for line in self.log(name).splitlines() if "http" in line])[0])

    def join(self, seconds: float = 120) -> dict[str, int]:
        """The exit statuses; processes that do not end are killed."""
        give_up, ends = time.monotonic() + seconds, {}
        for name, child in self.running.items():
            while not (ended := os.waitpid(child, os.WNOHANG))[0]:
                if time.monotonic() > give_up:
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.02)
            ends[name] = os.waitstatus_to_exitcode(ended[1])
        return ends


def main(folder: Path) -> None:
    engine, worker = example("inference_engine"), example("inference_worker")
    processes, compute = Processes(folder), worker.loss_of
    calls = 0

    def working(before: Callable[[int], None], *options: str) -> Callable[[], None]:
        """A worker that calls ``before(number)`` before it computes a loss."""

        def loss_of(*arguments: Any) -> float:
            nonlocal calls
            calls += 1
            before(calls)
            return float(compute(*arguments))

        def act() -> None:
            worker.loss_of = loss_of
            worker.main([processes.url("driver"), *options])

        return act

    def early(number: int) -> None:
        if number == 1:
            wait_for(lambda: (folder / "dying").exists() and (folder / "slow").exists())
        if LATE_FROM in processes.log("driver"):
            wait_for(lambda: (folder / "late").exists())

    def dying(number: int) -> None:
        if number == 2:
            (folder / "dying").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def slow(number: int) -> None:
        (folder / "slow").touch()
        if number == 1:
            wait_for(lambda: LATE_FROM in processes.log("driver"))
        if number == 2:
            wait_for(lambda: (folder / "late").exists())

    options = ["--steps", str(STEPS), "--timeout", "2", "--port", "0"]
    other = engine.model_of(None)
    other.model.norm.weight.data[5] += 2**-10
    other.save_pretrained(folder / "other")
    try:
        processes.start("driver", lambda: engine.main([str(folder / "pairs"), *options]))
        processes.start("early", working(early))
        processes.start("dying", working(dying))
        processes.start("slow", working(slow))
        processes.start("other base", working(lambda number: None, "--model", str(folder / "other")))
        processes.start("adapters", lambda: engine.main([str(folder / "adapters"), "--adapters", *options]))
        processes.start("of adapters", lambda: worker.main([processes.url("adapters")]))
        wait_for(lambda: LATE_FROM in processes.log("driver"))
        processes.start("late", working(lambda number: (folder / "late").touch()))
    except BaseException:
        processes.join(seconds=0)
        raise
    (folder / "ends.json").write_text(json.dumps(processes.join()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
