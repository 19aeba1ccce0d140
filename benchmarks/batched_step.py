"""Steps whose probes run in one forward, against as many plain forwards of one batch.

python benchmarks/batched_step.py --threads 2 --batch 1 --tokens 16 --json batched_step.json

On a random model of the shape of OPT-125M. A plain forward is that of the closure, with its loss.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from opt_model import random_opt
from torch import Tensor, nn
from torch.nn import functional

import zoext
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report, at_most
from zoext._benchmarking.timing import Measurement, interleaved, threads

#: Watched steps and checks come before this one.
WARM_UP = 5
POOL = 8
#: A batch of tokens, and the targets of a step and of a pool, in float32 and bfloat16.
TARGETS = {(4, 64): ((1.0, None), (1.1, None)), (1, 16): ((0.75, 0.4), (0.7, 0.3))}
#: Of a dense step in float32: what a batched one takes beside two forwards, relative to a streamed one.
DENSE_TARGET = 0.75

Step = Callable[[], object]


def losses_of(model: nn.Module, arguments: argparse.Namespace) -> Callable[[int], Tensor]:
    """The losses of copies of a random batch, the next token to be told."""
    generator = torch.Generator().manual_seed(0)
    size = (arguments.batch, arguments.tokens)
    ids = torch.randint(arguments.vocabulary, size, generator=generator).to(arguments.device)

    def losses(copies: int) -> Tensor:
        batch = zoext.repeat({"ids": ids}, copies)["ids"]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        each = functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
        return zoext.mean_per_copy(each, copies)

    return losses


def steps_of(model: nn.Module, arguments: argparse.Namespace) -> dict[str, Step]:
    losses = losses_of(model, arguments)
    # A model of its own: the steps of other optimizers would have held steps written.
    other = copy.deepcopy(model)

    def one() -> Tensor:
        return losses(1)[0]

    pool = zoext.ForwardDifference(samples=POOL - 1)
    lozo = partial(zoext.LOZO, model, refresh_interval=10**6)
    deferred = zoext.LOZO(other, refresh_interval=10**6, defer=True, probe="batched")
    optimizers: dict[str, tuple[zoext.ZerothOrderOptimizer, Callable[..., Tensor]]] = {
        "MeZO, streamed": (zoext.MeZO(model, probe="streamed"), one),
        "MeZO, batched": (zoext.MeZO(model, probe="batched"), losses),
        "LOZO, streamed": (lozo(probe="streamed"), one),
        "LOZO, batched": (lozo(probe="batched"), losses),
        "LOZO, batched, deferred": (deferred, losses_of(other, arguments)),
        "pool, batched": (lozo(estimator=pool, probe="batched"), losses),
    }
    found: dict[str, Step] = {}
    for name, (optimizer, closure) in optimizers.items():
        for _ in range(WARM_UP):
            optimizer.step(closure)
        found[name] = partial(optimizer.step, closure)
    return found


def measure(dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Measurement]:
    model = random_opt(arguments, dtype)
    losses = losses_of(model, arguments)

    @torch.no_grad()
    def forwards(calls: int, copies: int) -> None:
        for _ in range(calls):
            losses(copies)

    cases: dict[str, Step] = {
        "two forwards": partial(forwards, 2, 1),
        "forward of two copies": partial(forwards, 1, 2),
        "forwards of a pool": partial(forwards, POOL, 1),
        **steps_of(model, arguments),
    }
    return interleaved(cases, repeats=arguments.repeats, device=arguments.device)


def beyond(step: Measurement, forwards: Measurement) -> Measurement:
    """What a step takes beside forwards."""
    pairs = zip(step.rounds, forwards.rounds, strict=True)
    return Measurement(tuple(whole - part for whole, part in pairs))


def add(
    report: Report, label: str, times: dict[str, Measurement], targets: tuple[float | None, float | None]
) -> None:
    report.add_times(label, times)
    two = times["two forwards"]
    for name in (
        "forward of two copies",
        "MeZO, streamed",
        "MeZO, batched",
        "LOZO, streamed",
        "LOZO, batched",
        "LOZO, batched, deferred",
    ):
        target = targets[0] if name == "LOZO, batched, deferred" else None
        promised = at_most(target) if target is not None else None
        report.add(f"{label}: {name} / two forwards", times[name] / two, "x", promised)
    outside = beyond(times["MeZO, batched"], two) / beyond(times["MeZO, streamed"], two)
    promised = at_most(DENSE_TARGET) if label == "float32" else None
    report.add(f"{label}: MeZO, batched / streamed, without two forwards", outside, "x", promised)
    ratio = times["pool, batched"] / times["forwards of a pool"]
    report.add(
        f"{label}: LOZO, pool of {POOL}, batched / {POOL} forwards",
        ratio,
        "x",
        at_most(targets[1]) if targets[1] is not None else None,
    )


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=7)
    options.add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=4, help="examples in a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens in an example")
    arguments = parser.parse_args()
    size = options.describe(options.shapes_of(arguments))
    batch = (arguments.batch, arguments.tokens)
    report = Report(f"A step on {size}, batch {batch[0]} x {batch[1]}", options.settings_of(arguments))
    in_float32, in_bfloat16 = TARGETS.get(batch, ((None, None), (None, None)))
    with threads(arguments.threads):
        for dtype, targets in ((torch.float32, in_float32), (torch.bfloat16, in_bfloat16)):
            add(report, str(dtype).removeprefix("torch."), measure(dtype, arguments), targets)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
