"""A MeZO step on a model of the shape of OPT-125M: how much of it is not the two forwards.

python benchmarks/mezo_step.py --threads 2 --json mezo_step.json
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from baseline_step import BaselineStep
from opt_model import BATCH, TOKENS, closure_of, random_opt

import zoext
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report, at_most
from zoext._benchmarking.timing import Measurement, interleaved, threads

PROBES = ("streamed", "inplace")

#: A streamed probe watches steps 1, 2, 4, 8, 16, 32, ... and every 100th operator by operator. What a
#: run of thousands of steps costs is measured between two of them: the first round is one to warm up, and
#: none must be step 32.
WATCHED_STEPS = 16
MOST_REPEATS = 14


def measure(dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Measurement]:
    model = random_opt(arguments, dtype)
    closure = closure_of(model, arguments)

    @torch.no_grad()
    def two_forwards() -> None:
        closure()
        closure()

    cases = {"two forwards": two_forwards, "baseline step": partial(BaselineStep(model), closure)}
    for probe in PROBES:
        optimizer = zoext.MeZO(model, probe=probe)
        for _ in range(WATCHED_STEPS):
            optimizer.step(closure)
        cases[f"MeZO, {probe}"] = partial(optimizer.step, closure)
    return interleaved(cases, repeats=arguments.repeats, device=arguments.device)


def share_outside_forwards(forwards: Measurement, step: Measurement) -> Measurement:
    """In percent. Noise can make it negative where a step is hardly longer than its forwards."""
    return Measurement(tuple(100 * (1 - share) for share in (forwards / step).rounds))


def add(report: Report, label: str, times: dict[str, Measurement], target: float | None) -> None:
    report.add_times(label, times)
    forwards = times["two forwards"]
    for name in ("baseline step", *(f"MeZO, {probe}" for probe in PROBES)):
        promised = at_most(target) if target is not None and name != "baseline step" else None
        share = share_outside_forwards(forwards, times[name])
        report.add(f"{label}: {name}, outside forwards", share, "%", promised)
    for probe in PROBES:
        ratio = times["baseline step"] / times[f"MeZO, {probe}"]
        report.add(f"{label}: baseline step / MeZO, {probe}", ratio, "x")


def too_many(repeats: int) -> str:
    return f"must be at most {MOST_REPEATS}, not {repeats}: a streamed probe watches its 32nd step"


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=7)
    options.add_model_arguments(parser)
    arguments = parser.parse_args()
    if arguments.repeats > MOST_REPEATS:
        parser.error(f"argument --repeats: {too_many(arguments.repeats)}")
    size = options.describe(options.shapes_of(arguments))
    report = Report(f"A step on {size}, batch {BATCH} x {TOKENS}", options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype, target in ((torch.float32, 25.0), (torch.bfloat16, None)):
            add(report, str(dtype).removeprefix("torch."), measure(dtype, arguments), target)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
