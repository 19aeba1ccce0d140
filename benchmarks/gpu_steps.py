"""Whole steps on a GPU, on a random decoder in bfloat16: their time, and the memory they need."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from mezo_step import WATCHED_STEPS, share_outside_forwards
from opt_model import closure_of, random_opt
from step_memory import two_steps
from torch import Tensor, nn
from usual_step import UsualStep

import zoext
from zoext.benchmarking.memory import MIB, peak
from zoext.benchmarking.report import Report
from zoext.benchmarking.timing import Spread, interleaved

DTYPE = torch.bfloat16
USUAL, FORWARDS = "usual step", "two forwards"

Recipe = Callable[..., zoext.ZerothOrderOptimizer]
Closure = Callable[[], Tensor]

#: All take two forwards a step.
RECIPES: dict[str, Recipe] = {
    "MeZO, streamed": partial(zoext.MeZO, probe="streamed"),
    "MeZO, inplace": partial(zoext.MeZO, probe="inplace"),
    "AdaMeZO, streamed": partial(zoext.AdaMeZO, probe="streamed"),
    "AGZO, streamed": partial(zoext.AGZO, probe="streamed"),
}


def measure(report: Report, arguments: argparse.Namespace, label: str) -> None:
    """Adds the figures of one model; where the memory is too small for it, a note that says so.

    ``arguments`` hold the model's ``layers``, ``width`` and ``vocabulary``, and ``device``, ``batch``,
    ``tokens`` and ``repeats``.
    """
    torch.cuda.empty_cache()
    try:
        model = random_opt(arguments, DTYPE)
        closure = closure_of(model, arguments, batch=arguments.batch, tokens=arguments.tokens)
        peaks = memory(model, closure, arguments.device)
        times = seconds(model, closure, arguments)
    except torch.OutOfMemoryError as error:
        report.note(f"{label}: left out, since the free memory is too small: {str(error).splitlines()[0]}")
        return
    for name, size in peaks.items():
        report.add(f"{label}: {name}", Spread((size / MIB,)), "MiB")
    add_times(report, label, times)


def memory(model: nn.Module, closure: Closure, device: torch.device) -> dict[str, int]:
    """Bytes: the weights, the peak of a forward beyond them, and those of two steps beyond the forward's."""
    forward = peak(torch.no_grad()(closure), device)
    sizes = {
        "weights": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        "a forward, beyond the weights": forward,
    }
    for name, recipe in RECIPES.items():
        steps = partial(two_steps, partial(recipe, model), closure)
        sizes[f"{name}, beyond a forward"] = peak(steps, device) - forward
    sizes[f"{USUAL}, beyond a forward"] = peak(partial(UsualStep(model), closure), device) - forward
    return sizes


def seconds(model: nn.Module, closure: Closure, arguments: argparse.Namespace) -> dict[str, Spread]:
    """By the host's clock, from an idle device to an idle device: what a step costs a user."""

    @torch.no_grad()
    def two_forwards() -> None:
        closure()
        closure()

    cases: dict[str, Callable[[], object]] = {
        FORWARDS: two_forwards,
        USUAL: partial(UsualStep(model), closure),
    }
    for name, recipe in RECIPES.items():
        optimizer = recipe(model)
        for _ in range(WATCHED_STEPS):
            optimizer.step(closure)
        cases[name] = partial(optimizer.step, closure)
    return interleaved(cases, repeats=arguments.repeats, device=arguments.device)


def add_times(report: Report, label: str, times: dict[str, Spread]) -> None:
    report.add_times(label, times)
    for name in (USUAL, *RECIPES):
        share = share_outside_forwards(times[FORWARDS], times[name])
        report.add(f"{label}: {name}, outside forwards", share, "%")
    for name in RECIPES:
        report.add(f"{label}: {USUAL} / {name}", times[USUAL] / times[name], "x")
