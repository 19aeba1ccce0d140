"""Runs ``zoext`` on several ranks under the agent of torchrun.

A process imports everything once, and the ranks are forks of it. Reads a line of JSON for each launch from
stdin and writes one for each to stdout. Run as a program.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support import environment
from support.forking_server import MOMENTS, Kill, watch


@dataclass(frozen=True)
class Launched:
    """How a launch ended: what it printed, and the exit codes of the ranks that failed."""

    failed: dict[str, int]
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The lines of zoext on stderr, without those of torchrun."""
        return [line for line in self.err.splitlines() if line.startswith("zoext: ")]


class Launcher:
    """Starts the process; ``run`` runs ``zoext ARGUMENTS`` on ranks that are forks of it."""

    def __init__(self, folder: Path) -> None:
        variables = environment(
            OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
            TORCH_CPP_LOG_LEVEL="ERROR",
        )
        pipe = subprocess.PIPE
        self._folder = folder
        command = [sys.executable, "-m", "support.launched_commands", str(folder)]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables)

    def run(
        self,
        arguments: list[str],
        where: Path,
        *,
        ranks: int = 2,
        restarts: int = 0,
        kill: Kill | None = None,
        on: int = 0,
        file_size: int | None = None,
    ) -> Launched:
        """Runs in the folder ``where``.

        ``kill`` applies to the first attempt of rank ``on``, and ``file_size`` is the most that it can write.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "arguments": arguments,
            "ranks": ranks,
            "restarts": restarts,
            "kill": None if kill is None else asdict(kill),
            "on": on,
            "where": str(where),
            "file_size": file_size,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        failed = json.loads(self._process.stdout.readline())
        said = [(self._folder / name).read_text() for name in ("out", "err")]
        return Launched(failed, *said)

    def close(self) -> None:
        self._process.communicate()


def serve(folder: Path) -> None:
    from zoext.cli._comparison import report
    from zoext.cli._runs import results

    for name in (
        "safetensors.torch",
        "tqdm",
        "torch.distributed.launcher.api",
        "torch.distributed.tensor",
        "transformers.models.bert.modeling_bert",
    ):
        importlib.import_module(name)
    # Slow, and nothing depends on them.
    results.draw_curve = lambda *_: None
    report.draw_curves = lambda *_: None
    for line in sys.stdin:
        answers, answer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(answers)
            for name, descriptor in (("out", 1), ("err", 2)):
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
                os.dup2(os.open(folder / name, flags), descriptor)
            os.write(answer, json.dumps(launch(**json.loads(line))).encode())
            os._exit(0)
        os.close(answer)
        with os.fdopen(answers) as read:
            print(read.read(), flush=True)
        os.waitpid(child, 0)


def launch(ranks: int, restarts: int, where: str, **of_rank: Any) -> dict[int, int]:
    """Returns the exit codes of the ranks that failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(where)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="tests",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(config, run)(of_rank)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


def run(of_rank: dict[str, Any]) -> None:
    from zoext.cli import main

    if of_rank["on"] == int(os.environ["RANK"]):
        if of_rank["file_size"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (of_rank["file_size"], resource.RLIM_INFINITY))
        if of_rank["kill"] is not None and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            counted: Counter[str] = Counter()
            kill = Kill(**of_rank["kill"])
            for function in MOMENTS[kill.moment]:
                watch(kill.moment, function, kill, counted)
    sys.exit(main(of_rank["arguments"]))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
