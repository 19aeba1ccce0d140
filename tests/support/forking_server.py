"""A process that imports everything once and runs ``zoext`` in forks of itself, which can be killed.

Reads a line of JSON for each run from stdin and writes one for each to stdout. Run as a program.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from support import environment

#: Where a run can be killed, by name: before or after such a call, or with half of its data written.
MOMENTS = {
    "forward": ("torch.nn:Linear.forward",),
    "update": tuple(
        f"zoext.ops:{kind}_{verb}_" for kind in ("noise", "factored") for verb in ("axpy", "window")
    ),
    "fsync": ("os:fsync",),
    "rename": ("pathlib:Path.replace",),
    "text": ("pathlib:Path.write_text",),
    "tensors": ("safetensors.torch:save_file",),
    "trajectory": ("os:write",),
    "shorten": ("os:truncate",),
    "remove": ("shutil:rmtree",),
}


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the ``call``-th call of ``moment``, from 1; ``when`` is "before", "half" or "after".

    Or, where ``moment`` is "any", from outside after ``seconds``.
    """

    moment: str
    call: int = 0
    when: str = "before"
    seconds: float = 0.0


class Ended(NamedTuple):
    """How a run ended: exit status, negative for a signal, and its calls unless it was to be killed."""

    status: int
    calls: dict[str, int]
    seconds: float


class Server:
    """Starts the process; ``run`` runs ``zoext ARGUMENTS`` in a fork of it."""

    def __init__(self, folder: Path) -> None:
        variables = environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "support.forking_server", str(folder / "calls.json")]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables)

    def run(self, arguments: list[str], kill: Kill | None = None) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "kill": None if kill is None else asdict(kill)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def serve(calls: Path) -> None:
    from zoext.cli._runs import results

    for name in ("safetensors.torch", "tqdm", "transformers.models.bert.modeling_bert"):
        importlib.import_module(name)
    results.draw_curve = lambda *_: None  # slow, and nothing depends on it
    for line in sys.stdin:
        request = json.loads(line)
        kill = None if request["kill"] is None else Kill(**request["kill"])
        calls.unlink(missing_ok=True)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # stdout carries the answers
            run(request["arguments"], kill, calls)
        if kill is not None and kill.moment == "any":
            time.sleep(kill.seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        counted = json.loads(calls.read_text()) if calls.is_file() else {}
        answer = [os.waitstatus_to_exitcode(status), counted, time.monotonic() - began]
        print(json.dumps(answer), flush=True)


def run(arguments: list[str], kill: Kill | None, calls: Path) -> None:
    from zoext.cli import main

    counted: Counter[str] = Counter()
    for moment, functions in MOMENTS.items():
        for function in functions:
            watch(moment, function, kill, counted)
    try:
        status = main(arguments)
        if kill is None:
            calls.write_text(json.dumps(counted))
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    os._exit(status)


def watch(moment: str, function: str, kill: Kill | None, counted: Counter[str]) -> None:
    module, _, path = function.partition(":")
    *holders, name = path.split(".")
    holder = functools.reduce(getattr, holders, importlib.import_module(module))
    original = getattr(holder, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        counted[moment] += 1
        is_due = kill is not None and (kill.moment, kill.call) == (moment, counted[moment])
        if is_due and kill.when == "half":
            half(moment, original, arguments, options)
        if is_due and kill.when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        returned = original(*arguments, **options)
        if is_due:
            os.kill(os.getpid(), signal.SIGKILL)
        return returned

    setattr(holder, name, watched)


def half(moment: str, original: Callable[..., Any], arguments: Any, options: Any) -> None:
    """Calls ``original`` with half of the data."""
    match moment:
        case "trajectory":
            file, data = arguments
            original(file, data[: len(data) // 2])
        case "text":
            path, text = arguments
            original(path, text[: len(text) // 2], **options)
        case "tensors":
            tensors, path = arguments
            original(tensors, path)
            os.truncate(path, path.stat().st_size // 2)
        case _:
            raise ValueError(f"{moment} writes nothing")


HALVES = ("trajectory", "text", "tensors")

if __name__ == "__main__":
    serve(Path(sys.argv[1]))
