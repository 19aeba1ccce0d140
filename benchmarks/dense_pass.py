"""One pass ``theta += c z`` over the parameters of OPT-125M, against every limit and rival.

python benchmarks/dense_pass.py --threads 2 --json dense_pass.json
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from zoext import _C
from zoext._benchmarking import arguments as options
from zoext._benchmarking.dense_pass import STEPS, DensePass, add_rivals
from zoext._benchmarking.report import Report, at_least, at_most
from zoext._benchmarking.timing import Measurement, interleaved, threads
from zoext.ops import Distribution, Rounding


def on_one_thread(work: DensePass) -> None:
    with threads(1):
        work.fused()


def with_instruction_set(name: str, work: DensePass) -> None:
    before = _C.instruction_set()
    _C.use_instruction_set(name)
    work.fused()
    _C.use_instruction_set(before)


def variants(work: DensePass, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """The fused pass in ways other than its default."""
    cases: dict[str, Callable[[], object]] = {
        "fused pass, signs": partial(work.fused, distribution=Distribution.SIGN)
    }
    if device.type == "cpu":
        cases["fused pass, one thread"] = partial(on_one_thread, work)
        for name in _C.available_instruction_sets():
            if name != _C.instruction_set():
                cases[f"fused pass, {name}"] = partial(with_instruction_set, name, work)
    return cases


def roundings(work: DensePass) -> dict[str, Callable[[], object]]:
    """The fused pass over 16 bits in all its roundings."""
    return {
        "fused pass": work.fused,
        "fused pass, stochastic rounding": partial(work.fused, rounding=Rounding.STOCHASTIC),
        "fused pass, with residuals": partial(work.fused, rounding=Rounding.RESIDUAL),
    }


def add_roundings(report: Report, label: str, times: dict[str, Measurement]) -> None:
    for name, measured in times.items():
        if name != "fused pass":
            report.add(f"{label}: {name} / fused pass", measured / times["fused pass"], "x", at_most(1.25))


def steps(work: DensePass) -> dict[str, Callable[[], object]]:
    return {"steps at once": work.steps_at_once, "steps one by one": work.steps_one_by_one}


def add_steps(report: Report, label: str, times: dict[str, Measurement]) -> None:
    ratio = times["steps at once"] / times["steps one by one"]
    report.add(f"{label}: {STEPS} steps in one call / in {STEPS} calls", ratio, "x")


def add_variants(report: Report, label: str, times: dict[str, Measurement], count: int) -> None:
    signs = times["fused pass, signs"] / times["plain pass"]
    report.add(f"{label}: signs / plain pass", signs, "x", at_most(2))
    for name, measured in times.items():
        if not name.startswith("fused pass, ") or name == "fused pass, signs":
            continue
        two_threads = name == "fused pass, one thread" and count == 2
        target = at_least(1.7) if two_threads else None
        report.add(f"{label}: {name} / fused pass", measured / times["fused pass"], "x", target)


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=9)
    options.add_model_arguments(parser)
    arguments = parser.parse_args()
    shapes = options.shapes_of(arguments)
    report = Report(f"theta += c z over {options.describe(shapes)}", options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in (torch.float32, torch.bfloat16):
            work = DensePass(shapes, dtype, arguments.device)
            cases = work.rivals() | variants(work, dtype, arguments.device)
            times = interleaved(cases, repeats=arguments.repeats, device=arguments.device)
            label = str(dtype).removeprefix("torch.")
            add_rivals(report, label, times, arguments.device)
            add_variants(report, label, times, arguments.threads)
            few = max(arguments.repeats // 3, 1)
            add_steps(report, label, interleaved(steps(work), repeats=few, device=arguments.device))
        for dtype in (torch.bfloat16, torch.float16):
            work = DensePass(shapes, dtype, arguments.device)
            times = interleaved(roundings(work), repeats=arguments.repeats, device=arguments.device)
            add_roundings(report, str(dtype).removeprefix("torch."), times)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
