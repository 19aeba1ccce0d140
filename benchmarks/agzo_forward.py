"""What AGZO's bases cost: the forward at theta with its hooks, against the same forward without.

    python benchmarks/agzo_forward.py --threads 2 --json agzo_forward.json

On a random model of the shape of OPT-125M and a batch of 4 x 64 tokens. Every forward with hooks leaves the
basis of each linear layer's input behind, as the first forward of a step does.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from opt_model import BATCH, TOKENS, closure_of, random_opt
from torch import nn

import zoext
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report, at_most
from zoext._benchmarking.timing import Measurement, interleaved, threads
from zoext._parameters import parameters
from zoext.directions import Step


def forward_with_hooks(model: nn.Module, direction: zoext.ActivationSubspace, closure: object) -> None:
    groups = parameters.trainable([{"params": list(model.parameters())}])
    seed = torch.zeros(1, dtype=torch.int64, device=groups[0].device)
    observer = direction.observer(model, Step(seed, groups))
    assert observer is not None
    with torch.no_grad(), observer.watching():
        closure()  # type: ignore[operator]
    observer.frame()


def measure(dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Measurement]:
    model = random_opt(arguments, dtype)
    closure = closure_of(model, arguments)
    cases = {"forward": torch.no_grad()(closure)}
    for rank in (1, 4):
        direction = zoext.ActivationSubspace(rank=rank)
        cases[f"forward with hooks, rank {rank}"] = partial(forward_with_hooks, model, direction, closure)
    return interleaved(cases, repeats=arguments.repeats, device=arguments.device)


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=9)
    options.add_model_arguments(parser)
    arguments = parser.parse_args()
    size = options.describe(options.shapes_of(arguments))
    report = Report(f"AGZO's forward on {size}, batch {BATCH} x {TOKENS}", options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in (torch.float32, torch.bfloat16):
            label = str(dtype).removeprefix("torch.")
            times = measure(dtype, arguments)
            report.add_times(label, times)
            for rank in (1, 4):
                name = f"forward with hooks, rank {rank}"
                target = at_most(1.15) if rank == 1 and dtype == torch.float32 else None
                report.add(f"{label}: {name} / forward", times[name] / times["forward"], "x", target)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
