"""Draws optimizers on functions of two variables: Beale's, Rosenbrock's and Himmelblau's, and a double well.

Each optimizer takes all steps that a budget of forward passes allows. A gradient counts as 3: a forward, and
a backward of twice the work. AGZO and LOZO are left out, because they need the activations or the weight
matrices of a model; a point has neither.

Every learning rate is the best of a grid, of equal size for each optimizer, at equal forward passes; the
worst of the seeds 0 to 4 decides. Those that come with zoext were chosen for the default budget; --sweep
chooses them again.
"""

from __future__ import annotations

import argparse
import dataclasses

from zoext.cli import _options
from zoext.cli._pictures import landscape, style, sweep
from zoext.cli._pictures.descent import GRADIENT_FORWARDS, METHODS, MU, Descent, descend
from zoext.cli._pictures.functions import FUNCTIONS
from zoext.cli._pictures.output import Output

HELP = "optimizers on functions of two variables"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--forwards",
        type=_options.count,
        metavar="N",
        default=sweep.FORWARDS,
        help=f"forward passes of each optimizer (default {sweep.FORWARDS})",
    )
    parser.add_argument(
        "--seed", type=_options.seed, metavar="N", default=0, help="of the directions (default 0)"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        dest="sweeps",
        help="choose the learning rates again, which takes many minutes",
    )


def draw(output: Output, *, forwards: int, seed: int, sweeps: bool) -> None:
    """Runs all optimizers on all functions."""
    rates = _swept(output, forwards) if sweeps else sweep.CHOSEN
    descents = {
        name: {
            method: descend(function, METHODS[method], lr, forwards, seed)
            for method, lr in rates[name].items()
        }
        for name, function in FUNCTIONS.items()
    }
    numbers = {
        "forwards": forwards,
        "forwards_of_a_gradient": GRADIENT_FORWARDS,
        "mu": MU,
        "seed": seed,
        "lr_chosen_at_forwards": forwards if sweeps else sweep.FORWARDS,
        "lr_grids": {name: sweep.grid(method) for name, method in METHODS.items()},
        "functions": {name: _numbers(found, rates[name]) for name, found in descents.items()},
    }
    with style.new_figure(11, 5.8) as figure:
        landscape.draw(figure, descents)
        output.write(figure, numbers)
    output.say(_table(descents))


def _swept(output: Output, forwards: int) -> sweep.Rates:
    rates: sweep.Rates = {name: {} for name in FUNCTIONS}
    for name, method, lr in sweep.swept(forwards):
        output.say(f"{name}, {method}: lr {lr:g}")
        rates[name][method] = lr
    return rates


def _numbers(found: dict[str, Descent], rates: dict[str, float]) -> dict[str, object]:
    return {method: {"lr": rates[method], **dataclasses.asdict(descent)} for method, descent in found.items()}


def _table(descents: dict[str, dict[str, Descent]]) -> str:
    """The values at the end, in columns."""
    rows = [["value at the end", *(FUNCTIONS[name].title for name in descents)]]
    for method in METHODS:
        ends = [found[method].values[-1] for found in descents.values()]
        rows.append([METHODS[method].label, *(f"{end:.2g}" for end in ends)])
    return "\n".join(f"{row[0]:<18}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows)
