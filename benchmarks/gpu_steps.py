"""Whole steps on a GPU, on a random decoder in bfloat16: their time, and the memory they need.

Some are taken from a CUDA graph as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from baseline_step import BaselineStep
from mezo_step import WATCHED_STEPS, share_outside_forwards
from opt_model import closure_of, random_opt
from step_memory import two_steps
from torch import Tensor, nn

import zoext
from zoext._benchmarking.memory import MIB, CudaPeaks, cuda_peaks
from zoext._benchmarking.report import Report
from zoext._benchmarking.timing import Measurement, interleaved

DTYPE = torch.bfloat16
BASELINE, FORWARD, FORWARDS = "baseline step", "a forward", "two forwards"

Recipe = Callable[..., zoext.ZerothOrderOptimizer]
Closure = Callable[[], Tensor]

#: All take two forwards a step.
RECIPES: dict[str, Recipe] = {
    "MeZO, streamed": partial(zoext.MeZO, probe="streamed"),
    "MeZO, inplace": partial(zoext.MeZO, probe="inplace"),
    "AdaMeZO, streamed": partial(zoext.AdaMeZO, probe="streamed"),
    "AGZO, streamed": partial(zoext.AGZO, probe="streamed"),
}


#: Taken from a graph as well.
GRAPHED = ("MeZO, streamed", "MeZO, inplace", "AdaMeZO, streamed")

#: Three without a graph, ten more until the window of AdaMeZO is full, and the one that is captured.
STEPS_TO_A_GRAPH = 14


def measure(report: Report, arguments: argparse.Namespace, label: str) -> None:
    """Adds the figures of one model; where the memory is too small for it, a note that says so.

    ``arguments`` hold the model's ``layers``, ``width`` and ``vocabulary``, and ``device``, ``batch``,
    ``tokens`` and ``repeats``.
    """
    torch.cuda.empty_cache()
    without_graph: dict[str, str] = {}
    try:
        model = random_opt(arguments, DTYPE)
        closure = closure_of(model, arguments, batch=arguments.batch, tokens=arguments.tokens)
        weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        report.add(f"{label}: weights", Measurement((weights / MIB,)), "MiB")
        add_memory(report, label, memory(model, closure, arguments.device, without_graph))
        add_times(report, label, seconds(model, closure, arguments))
        add_graphs(report, label, seconds_of_graphs(model, closure, arguments, without_graph))
    except torch.OutOfMemoryError as error:
        report.note(f"{label}: what is missing does not fit into the free memory: {first_line(error)}")
    for name, reason in without_graph.items():
        report.note(f"{label}: {name} from a graph was left out: {reason}")


def eager_step(recipe: Recipe, model: nn.Module, closure: Closure) -> Callable[[], Tensor]:
    """A step as most of a long run are."""
    optimizer = recipe(model)
    for _ in range(WATCHED_STEPS):
        optimizer.step(closure)
    return partial(optimizer.step, closure)


def graphed_step(recipe: Recipe, model: nn.Module, closure: Closure) -> zoext.GraphedStep:
    """A step whose graph is there: what it launches is replayed from now on.

    Raises:
        RuntimeError: if it cannot be captured, or the memory is too small.
    """
    step = zoext.GraphedStep(recipe(model), closure)
    for _ in range(STEPS_TO_A_GRAPH):
        step()
    return step


def memory(
    model: nn.Module, closure: Closure, device: torch.device, without_graph: dict[str, str]
) -> dict[str, CudaPeaks]:
    """The peaks of a forward, and those of each kind of step, from the making of its optimizer on.

    A step that cannot be captured in a graph is put into ``without_graph``, with the reason.
    """
    peaks = {FORWARD: cuda_peaks(torch.no_grad()(closure), device)}
    for name, recipe in RECIPES.items():
        peaks[name] = cuda_peaks(partial(two_steps, partial(recipe, model), closure), device)
    for name in GRAPHED:
        try:
            peaks[from_a_graph(name)] = cuda_peaks(
                partial(graphed_step, RECIPES[name], model, closure), device
            )
        except RuntimeError as error:
            without_graph[name] = first_line(error)
    peaks[BASELINE] = cuda_peaks(partial(BaselineStep(model), closure), device)
    return peaks


def seconds(model: nn.Module, closure: Closure, arguments: argparse.Namespace) -> dict[str, Measurement]:
    """By the host's clock, from an idle device to an idle device: what a step costs a user."""

    @torch.no_grad()
    def two_forwards() -> None:
        closure()
        closure()

    cases: dict[str, Callable[[], object]] = {
        FORWARDS: two_forwards,
        BASELINE: partial(BaselineStep(model), closure),
    }
    for name, recipe in RECIPES.items():
        cases[name] = eager_step(recipe, model, closure)
    return interleaved(cases, repeats=arguments.repeats, device=arguments.device)


def seconds_of_graphs(
    model: nn.Module, closure: Closure, arguments: argparse.Namespace, without_graph: dict[str, str]
) -> dict[str, Measurement]:
    """As ``seconds``, of steps from a graph and of the same without one.

    In rounds without the baseline step, which replaces the weights: where their memory changes, the graph is
    dropped. What is in ``without_graph`` is left out, and what cannot be captured here is put there.
    """
    cases: dict[str, Callable[[], object]] = {}
    for name in GRAPHED:
        if name in without_graph:
            continue
        try:
            graphed = graphed_step(RECIPES[name], model, closure)
        except RuntimeError as error:
            without_graph[name] = first_line(error)
        else:
            cases |= {name: eager_step(RECIPES[name], model, closure), from_a_graph(name): graphed}
    return interleaved(cases, repeats=arguments.repeats, device=arguments.device)


def from_a_graph(name: str) -> str:
    return f"{name}, graphed"


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def add_memory(report: Report, label: str, peaks: dict[str, CudaPeaks]) -> None:
    """Those of a forward as they are; those of steps beyond a forward's."""
    forward = peaks[FORWARD]
    report.add(f"{label}: {FORWARD}, beyond the weights", Measurement((forward.allocated / MIB,)), "MiB")
    report.add(
        f"{label}: {FORWARD}, reserved beyond the weights", Measurement((forward.reserved / MIB,)), "MiB"
    )
    for name, peak in peaks.items():
        if name != FORWARD:
            allocated, reserved = peak.allocated - forward.allocated, peak.reserved - forward.reserved
            report.add(f"{label}: {name}, beyond a forward", Measurement((allocated / MIB,)), "MiB")
            report.add(f"{label}: {name}, reserved beyond a forward", Measurement((reserved / MIB,)), "MiB")


def add_times(report: Report, label: str, times: dict[str, Measurement]) -> None:
    report.add_times(label, times)
    for name in (BASELINE, *RECIPES):
        share = share_outside_forwards(times[FORWARDS], times[name])
        report.add(f"{label}: {name}, outside forwards", share, "%")
    for name in RECIPES:
        report.add(f"{label}: {BASELINE} / {name}", times[BASELINE] / times[name], "x")


def add_graphs(report: Report, label: str, times: dict[str, Measurement]) -> None:
    """The times without a graph are those of rounds that ``add_times`` has not: only the ratio is shown."""
    for name in GRAPHED:
        if name in times:
            graphed = from_a_graph(name)
            report.add_times(label, {graphed: times[graphed]})
            report.add(f"{label}: {name}, graphed / eager", times[graphed] / times[name], "x")
