"""A step of a pool of four candidates on two processes of one thread, against one process.

    python benchmarks/probe_parallel.py --json probe_parallel.json

MeZO-GV evaluates its four candidates, then one probe on either side of theta: six forwards, of which each of
two ranks has three. All cases take one step in turn, round by round; a rank without work does not spin.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from mezo_step import MOST_REPEATS, WATCHED_STEPS, too_many
from opt_model import TOKENS, closure_of, random_opt

import zoext
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report, at_most
from zoext._benchmarking.timing import Measurement, threads

RANKS, POOL = 2, 4
BATCH = 16  # so that forwards take most of a step: updates are not divided
ALONE = {"one process of one thread": 1, "one process of two threads": 2}
BOTH = "two processes of one thread"


def measure(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """Measures on each rank, and writes the seconds of the first one to ``folder``."""
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    cases = {name: step_of(arguments, None) for name in ALONE} if rank == 0 else {}
    cases[BOTH] = step_of(arguments, dist.group.WORLD)
    times: dict[str, list[float]] = {name: [] for name in (*ALONE, BOTH)}
    for number in range(WATCHED_STEPS + 1 + arguments.repeats):
        for name in (*ALONE, BOTH):
            dist.barrier()
            if name not in cases:
                continue
            with threads(ALONE.get(name, 1)):
                began = time.perf_counter()
                cases[name]()
                if number > WATCHED_STEPS:
                    times[name].append(time.perf_counter() - began)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def step_of(arguments: argparse.Namespace, group: dist.ProcessGroup | None) -> Callable[[], object]:
    """A step on a model of its own, whose probes are dealt out over ``group``."""
    torch.manual_seed(0)
    model = random_opt(arguments, torch.float32)
    closure = closure_of(model, arguments, batch=BATCH)
    optimizer = zoext.MeZOGV(model, pool_size=POOL, process_group=None, probe_group=group)
    return lambda: optimizer.step(closure)


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_json_argument(parser)
    options.add_count(parser, "--repeats", MOST_REPEATS, "rounds, after those that warm up")
    options.add_model_arguments(parser)
    parser.set_defaults(layers=2, width=256, vocabulary=2000)  # a forward takes about 120 ms on a core
    arguments = parser.parse_args()
    if arguments.repeats > MOST_REPEATS:
        parser.error(f"argument --repeats: {too_many(arguments.repeats)}")
    arguments.device = torch.device("cpu")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with TemporaryDirectory() as folder:
        processes.spawn(measure, (arguments, folder), RANKS)
        found = json.loads(Path(folder, "times.json").read_text())
    times = {name: Measurement(tuple(taken)) for name, taken in found.items()}
    size = options.describe(options.shapes_of(arguments))
    title = f"MeZO-GV with a pool of {POOL} on {size}, batch {BATCH} x {TOKENS}"
    report = Report(title, options.settings_of(arguments))
    report.add_times("step", times)
    one, two = (times[name] for name in ALONE)
    ideal = Measurement(tuple(each / RANKS for each in one.rounds))
    report.add(f"{BOTH} / half of one process of one thread", times[BOTH] / ideal, "x", at_most(1.1))
    report.add(f"{BOTH} / one process of two threads", times[BOTH] / two, "x")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
