"""What a step needs beyond inference: its peak of memory less that of a plain forward.

    python benchmarks/step_memory.py --json step_memory.json

Counts what torch's allocator hands out, from the making of the optimizer to the end of its second
step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from opt_model import BATCH, TOKENS, closure_of, random_opt
from torch import Tensor, nn
from usual_step import UsualStep

import zoext
from zoext.benchmarking import arguments as options
from zoext.benchmarking.memory import MIB, peak
from zoext.benchmarking.report import Bar, Report, at_most
from zoext.benchmarking.timing import Spread, threads


def largest_module(model: nn.Module) -> int:
    """Bytes of the weights of the module that owns most."""
    return max(
        sum(weight.numel() * weight.element_size() for weight in module.parameters(recurse=False))
        for module in model.modules()
    )


def two_steps(model: nn.Module, closure: Callable[[], Tensor], probe: str) -> None:
    optimizer = zoext.MeZO(model, probe=probe)
    optimizer.step(closure)
    optimizer.step(closure)


def measure(report: Report, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    label = str(dtype).removeprefix("torch.")
    model = random_opt(arguments, dtype)
    closure = closure_of(model, arguments)
    largest = largest_module(model) / MIB
    forward = torch.no_grad()(closure)
    inference = peak(forward, arguments.device)
    report.add(f"{label}: a forward", Spread((inference / MIB,)), "MiB")
    report.add(f"{label}: largest module", Spread((largest,)), "MiB")
    cases: list[tuple[str, Callable[[], object], Bar | None]] = [
        ("MeZO, inplace", partial(two_steps, model, closure, "inplace"), at_most(1)),
        ("MeZO, streamed", partial(two_steps, model, closure, "streamed"), at_most(largest + 1)),
        ("usual step", partial(UsualStep(model), closure), None),
    ]
    for name, work, bar in cases:
        extra = [(peak(work, arguments.device) - inference) / MIB for _ in range(arguments.repeats)]
        report.add(f"{label}: {name}, beyond a forward", Spread(tuple(extra)), "MiB", bar)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_measuring_arguments(parser, repeats=1)
    options.add_model_arguments(parser)
    arguments = parser.parse_args()
    size = options.describe(options.shapes_of(arguments))
    report = Report(f"Memory of a step on {size}, batch {BATCH} x {TOKENS}", options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in (torch.float32, torch.bfloat16):
            measure(report, dtype, arguments)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
