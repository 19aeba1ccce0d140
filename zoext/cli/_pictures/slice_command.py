"""Draws the loss of a model along random directions z ~ N(0, I), and how it varies over batches.

The loss of several training batches is evaluated at theta + t z; the weights are bit for bit the same
afterwards. The last panel compares the projected gradients of central differences with their extrapolation to
mu = 0: choose a mu whose error is far below the noise of a batch.

MODEL and DATA are those of zoext finetune. With --run, model, data and settings are those of a run, with the
weights that its trajectory leads to. Without any of these the model is that of zoext finetune --demo words.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoext.cli import _options
from zoext.cli._errors import UserError, require
from zoext.cli._pictures import model_slice, slice_figure, slices, style
from zoext.cli._pictures.output import Output
from zoext.cli._pictures.slices import Plan
from zoext.cli._problem import demo
from zoext.cli._ranks import ALONE
from zoext.cli._settings import DTYPES, PROBES, Settings

HELP = "the loss of a model along random directions"

_REACH = 10

#: A slice evaluates one point after the other.
_PROBES = tuple(each for each in PROBES if each != "batched")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; settings of a model that are not given are absent from the namespace."""
    parser.argument_default = argparse.SUPPRESS
    defaults = _options.Defaults(Settings(), demo.SETTINGS)
    _options.add_task(parser, defaults)
    what = parser.add_argument_group("slice", "defaults, and in brackets those of the demo on words")
    what.add_argument("--run", type=Path, metavar="DIR", help="take model, data and settings of this run")
    what.add_argument(
        "--to-step",
        type=_options.whole,
        metavar="N",
        help="the weights after this step of the run (default: its last)",
    )
    defaults.add(what, "mu", _options.positive, "X", "the scale of the perturbation that is marked")
    what.add_argument(
        "--reach", type=_options.positive, metavar="X", help=f"t is in -X ... X (default {_REACH} mu)"
    )
    numbers = (
        ("points", _odd, 21, "values of t"),
        ("directions", _options.count, 2, "random directions"),
        ("batches", _options.count, 4, "training batches"),
    )
    for name, kind, default, text in numbers:
        what.add_argument(
            f"--{name}", type=kind, metavar="N", default=default, help=f"{text} (default {default})"
        )
    defaults.add(what, "batch-size", _options.count, "N", "examples per batch")
    defaults.add(what, "seed", _options.seed, "N", "determines directions and batches")
    what.add_argument("--dtype", choices=DTYPES, help=f"of the weights (default {Settings.dtype})")
    what.add_argument(
        "--probe", choices=_PROBES, help=f"how weights are perturbed (default {Settings.probe})"
    )
    what.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")


def _odd(text: str) -> int:
    number = _options.count(text)
    if number < 3 or number % 2 == 0:
        raise argparse.ArgumentTypeError(
            f"must be odd, since t = 0 is one of them, and at least 3, not {text}"
        )
    return number


def draw(
    output: Output,
    *,
    points: int,
    directions: int,
    batches: int,
    run: Path | None = None,
    to_step: int | None = None,
    reach: float | None = None,
    **given: Any,
) -> None:
    """Evaluates the model before anything is written."""
    require(("transformers", "safetensors", "tqdm"), "finetune")
    if to_step is not None and run is None:
        raise UserError(f"--to-step {to_step}: needs --run")
    settings = model_slice.settings_of(given, run)
    plan = Plan(settings.mu, reach or _REACH * settings.mu, points, directions, settings.seed)
    device = _options.choose_device(settings.device, ALONE)
    problem = model_slice.load_at(settings, run, to_step, device)
    output.say(f"{problem.title}, {settings.dtype} on {device}\n{batches * plan.evaluations} forward passes")
    measured = model_slice.measure(problem, settings, plan, batches, device, output.quiet)
    found = slices.accuracy(measured)
    with style.new_figure(*slice_figure.size(measured)) as figure:
        slice_figure.draw(figure, measured, found, problem.title)
        output.write(figure, slice_figure.numbers(measured, found))
    output.say(slices.advice(measured, found))
