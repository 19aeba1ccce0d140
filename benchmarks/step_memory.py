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
from baseline_step import BaselineStep
from opt_model import BATCH, TOKENS, closure_of, random_opt
from torch import Tensor, nn

import zoext
from zoext._benchmarking import arguments as options
from zoext._benchmarking.memory import MIB, peak
from zoext._benchmarking.report import Report, Target, at_most
from zoext._benchmarking.timing import Measurement, threads


def largest_module(model: nn.Module) -> int:
    """Bytes of the weights of the module that owns most."""
    return max(
        sum(weight.numel() * weight.element_size() for weight in module.parameters(recurse=False))
        for module in model.modules()
    )


def two_steps(make: Callable[[], zoext.ZerothOrderOptimizer], closure: Callable[[], Tensor]) -> None:
    optimizer = make()
    optimizer.step(closure)
    optimizer.step(closure)


def size_of_bases(model: nn.Module) -> int:
    """Bytes of AGZO's bases of rank 1, one for each linear layer as if none were shared."""
    return sum(4 * module.in_features for module in model.modules() if isinstance(module, nn.Linear))


def measure(report: Report, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    label = str(dtype).removeprefix("torch.")
    model = random_opt(arguments, dtype)
    closure = closure_of(model, arguments)
    largest = largest_module(model) / MIB
    forward = torch.no_grad()(closure)
    inference = peak(forward, arguments.device)
    report.add(f"{label}: a forward", Measurement((inference / MIB,)), "MiB")
    report.add(f"{label}: largest module", Measurement((largest,)), "MiB")
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    targets = {"inplace": at_most(1), "streamed": at_most(largest + 1)}
    for probe, target in targets.items():
        cases: list[tuple[str, Callable[[], object], Target | None]] = [
            (f"MeZO, {probe}", partial(two_steps, partial(zoext.MeZO, model, probe=probe), closure), target),
            (
                f"AdaMeZO, {probe}",
                partial(two_steps, partial(zoext.AdaMeZO, model, probe=probe), closure),
                target,
            ),
            (f"AGZO, {probe}", partial(two_steps, partial(zoext.AGZO, model, probe=probe), closure), None),
        ]
        peaks = {}
        for name, work, promised in cases:
            rounds = tuple(peak(work, arguments.device) for _ in range(arguments.repeats))
            extra = tuple((value - inference) / MIB for value in rounds)
            report.add(f"{label}: {name}, beyond a forward", Measurement(extra), "MiB", promised)
            peaks[name] = Measurement(tuple(float(weights + value) for value in rounds))
        without_bases = tuple(value - size_of_bases(model) for value in peaks[f"AGZO, {probe}"].rounds)
        ratio = Measurement(without_bases) / peaks[f"MeZO, {probe}"]
        report.add(f"{label}: AGZO less its bases / MeZO, {probe}, with weights", ratio, "x", at_most(1.02))
    baseline = tuple(
        (peak(partial(BaselineStep(model), closure), arguments.device) - inference) / MIB for _ in "1"
    )
    report.add(f"{label}: baseline step, beyond a forward", Measurement(baseline), "MiB")


def main() -> None:
    parser = options.parser_of(__doc__)
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
