"""A recorded run of the demo against its replay: seconds a step, and that the bits are the same.

    python benchmarks/replay.py --threads 2 --json replay.json

The demo is that of ``zoext finetune``: MiniLM with 10.8 million trainable parameters. A replay reads the
trajectory and hashes all weights before it changes them; that cost is distributed over --run-steps steps.
Neither side includes loading the model. The run counts its median step, because some steps of a streamed
probe are checked and take longer.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from opt_model import require_transformers
from torch import nn

import zoext
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report, at_least
from zoext._benchmarking.timing import Measurement, threads
from zoext.cli._problem import demo, load, optimizers, steps
from zoext.cli._problem.optimizers import OPTIMIZERS
from zoext.cli._problem.problem import Problem
from zoext.cli._settings import Settings

METHODS = ("mezo", "adamezo", "lozo")


class Seconds(NamedTuple):
    """Of a step of the run; of a replay's beginning, once; and of a step of the replay."""

    step: float
    replay_begins: float
    replay_step: float


def settings_of(method: str, dtype: str) -> Settings:
    defaults = demo.SETTINGS
    return dataclasses.replace(
        defaults, optimizer=method, lr=defaults.lr * OPTIMIZERS[method].lr_scale, seed=3, dtype=dtype
    )


def measure(problem: Problem, settings: Settings, steps: int, folder: Path) -> Seconds:
    """Runs and replays ``steps`` steps on copies of the problem's model."""
    running = dataclasses.replace(problem, model=copy.deepcopy(problem.model))
    path = folder / "run.jsonl"
    path.unlink(missing_ok=True)
    optimizer = optimizers.make(running.model, settings)
    with zoext.Trajectory(path, optimizer):
        step_seconds = [_step_seconds(running, optimizer, settings, number) for number in range(steps)]
    begins = _replay_seconds(copy.deepcopy(problem.model), path, to_step=0)
    again = copy.deepcopy(problem.model)
    whole = _replay_seconds(again, path, to_step=steps)
    _check_equal(running.model, again)
    return Seconds(statistics.median(step_seconds), begins, max(whole - begins, 1e-9) / steps)


def _step_seconds(
    problem: Problem, optimizer: zoext.ZerothOrderOptimizer, settings: Settings, number: int
) -> float:
    began = time.perf_counter()
    steps.take(problem, optimizer, settings, number, torch.device("cpu"))
    return time.perf_counter() - began


def _replay_seconds(model: nn.Module, path: Path, to_step: int) -> float:
    began = time.perf_counter()
    zoext.replay(model, path, to_step=to_step)
    return time.perf_counter() - began


def _check_equal(run: nn.Module, replayed: nn.Module) -> None:
    theirs = dict(replayed.named_parameters())
    other = [name for name, tensor in run.named_parameters() if not torch.equal(tensor, theirs[name])]
    if other:
        sys.exit(f"the replay left other bits than the run in {len(other)} parameters, {other[0]} among them")


def add(report: Report, method: str, rounds: list[Seconds], run_steps: int) -> None:
    run = Measurement(tuple(seconds.step for seconds in rounds))
    begins = Measurement(tuple(seconds.replay_begins for seconds in rounds))
    each = Measurement(tuple(seconds.replay_step for seconds in rounds))
    share = Measurement(tuple(seconds.replay_begins / run_steps + seconds.replay_step for seconds in rounds))
    report.add_times(method, {"step": run, "replay, beginning": begins, "replay, step": each})
    report.add(f"{method}: step / step of the replay", run / share, "x", at_least(20))


def main() -> None:
    parser = options.parser_of(__doc__)
    parser.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_count(parser, "--steps", 100, "recorded")
    options.add_count(parser, "--run-steps", 1000)
    options.add_count(parser, "--repeats", 3)
    options.add_threads_and_json_arguments(parser)
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if unknown := [method for method in methods if method not in OPTIMIZERS]:
        parser.error(f"argument --methods: {unknown[0]!r} is none of {', '.join(OPTIMIZERS)}")
    require_transformers()
    title = f"A run of {arguments.steps} steps of the demo and its replay, bits compared"
    report = Report(title, options.settings_of(arguments))
    with threads(arguments.threads), tempfile.TemporaryDirectory() as folder:
        for method in methods:
            settings = settings_of(method, arguments.dtype)
            problem = load(settings, torch.device("cpu"))
            rounds = [
                measure(problem, settings, arguments.steps, Path(folder)) for _ in range(arguments.repeats)
            ]
            add(report, method, rounds, arguments.run_steps)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
