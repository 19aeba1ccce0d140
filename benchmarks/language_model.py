"""A small language model fine-tuned in float32 and in bfloat16: what each way of rounding makes of the loss.

    python benchmarks/language_model.py --folder DIR --threads 1 --json language_model.json

DIR has a causal model of transformers in ``stories260k`` and texts, one a line, in ``fables_train.txt`` and
``fables_valid.txt``. Every rival takes the same steps of MeZO on the same batches, each seed has others. A
model is judged in the dtype that it was tuned in, and once more with its weights as float32.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from baseline_step import BaselineStep
from opt_model import require_transformers
from torch import Tensor

import zoext
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report, at_least, at_most
from zoext._benchmarking.timing import Measurement, threads
from zoext.cli._problem import problem, steps
from zoext.cli._problem.evaluation import evaluate
from zoext.cli._problem.problem import Problem
from zoext.cli._settings import Settings

FIXTURES = Path(__file__).absolute().parents[1].parent / "shared" / "fixtures"
FIRST_SEED = 11

#: How far above the loss of float32 a run may end, in percent.
CLOSE = 2.0

Closure = Callable[[], Tensor]
StepWith = Callable[[Closure], object]


@dataclass(frozen=True)
class Rival:
    """A dtype of the weights, and how steps are taken; without a precision as the published script does."""

    dtype: str
    precision: str | None

    def stepper(self, problem: Problem, settings: Settings) -> StepWith:
        model, lr, mu = problem.model, settings.lr, settings.mu
        if self.precision is None:
            random.seed(settings.seed)  # of which the script draws the seed of each step
            return BaselineStep(model, lr=lr, mu=mu)
        return zoext.MeZO(model, lr=lr, mu=mu, seed=settings.seed, precision=self.precision).step


REFERENCE = "float32"
RESIDUAL = "bfloat16, residual"
BASELINE = "bfloat16, baseline"
RIVALS = {
    REFERENCE: Rival("float32", "nearest"),
    "float32, baseline": Rival("float32", None),
    "bfloat16, nearest": Rival("bfloat16", "nearest"),
    "bfloat16, stochastic": Rival("bfloat16", "stochastic"),
    RESIDUAL: Rival("bfloat16", "residual"),
    BASELINE: Rival("bfloat16", None),
}


class Outcome(NamedTuple):
    """Held-out losses in nats a token: before the run, after it, and after it with weights as float32."""

    before: float
    after: float
    as_float32: float


def run(rival: Rival, arguments: argparse.Namespace, seed: int) -> Outcome:
    settings = Settings(
        model=str(arguments.folder / "stories260k"),
        data=str(arguments.folder / "fables_train.txt"),
        valid_data=str(arguments.folder / "fables_valid.txt"),
        max_length=arguments.tokens,
        batch_size=arguments.batch,
        lr=arguments.lr,
        mu=arguments.mu,
        dtype=rival.dtype,
        seed=seed,
    )
    learnt = problem.load(settings)
    before = held_out_loss(learnt, settings)
    take = rival.stepper(learnt, settings)
    for number in range(arguments.steps):
        (batch,) = steps.batches(learnt, settings, number, torch.device("cpu"))
        take(partial(loss_on, learnt, batch))
    after = held_out_loss(learnt, settings)
    learnt.model.float()
    return Outcome(before, after, held_out_loss(learnt, settings))


def loss_on(problem: Problem, batch: dict[str, Tensor]) -> Tensor:
    return problem.objective.scores(problem.model, batch).mean_loss()


def held_out_loss(problem: Problem, settings: Settings) -> float:
    cpu = torch.device("cpu")
    return evaluate(problem.model, problem.objective, problem.valid, settings.batch_size, cpu).loss.value


def add(report: Report, outcomes: dict[str, list[Outcome]]) -> None:
    for name, runs in outcomes.items():
        for field in Outcome._fields:
            losses = Measurement(tuple(getattr(outcome, field) for outcome in runs))
            report.add(f"{name}: loss {field.replace('_', ' ')}", losses, "nats")
    targets = {RESIDUAL: at_most(CLOSE), BASELINE: at_least(CLOSE)}
    for name, runs in outcomes.items():
        if name != REFERENCE and REFERENCE in outcomes:
            pairs = zip(runs, outcomes[REFERENCE], strict=True)
            excess = Measurement(tuple(100 * (own.after / other.after - 1) for own, other in pairs))
            report.add(f"{name}: loss above that of {REFERENCE}", excess, "%", targets.get(name))


def names_of_rivals(text: str) -> list[str]:
    """For ``type`` of an option: names with semicolons between them, since they have commas."""
    names = [name.strip() for name in text.split(";")]
    if unknown := [name for name in names if name not in RIVALS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {'; '.join(RIVALS)}")
    return names


def main() -> None:
    parser = options.parser_of(__doc__)
    parser.add_argument("--folder", type=Path, default=FIXTURES, help="default: %(default)s")
    parser.add_argument("--rivals", type=names_of_rivals, default=list(RIVALS), metavar="'NAME; NAME'")
    options.add_count(parser, "--seeds", 3, "how many")
    options.add_count(parser, "--steps", 1000)
    options.add_count(parser, "--batch", 8, "texts")
    options.add_count(parser, "--tokens", 64, "of a text")
    parser.add_argument("--lr", type=float, default=5e-5, help="default: %(default)s")
    parser.add_argument("--mu", type=float, default=1e-3, help="default: %(default)s")
    options.add_threads_and_json_arguments(parser)
    arguments = parser.parse_args()
    require_transformers()
    if not arguments.folder.is_dir():
        sys.exit(f"{arguments.folder} is not there: give the folder of the model and the texts by --folder")
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    title = f"{arguments.steps} steps of MeZO on a small language model, {len(seeds)} seeds"
    report = Report(title, options.settings_of(arguments))
    with threads(arguments.threads), torch.random.fork_rng(devices=[]):
        outcomes = {name: [run(RIVALS[name], arguments, seed) for seed in seeds] for name in arguments.rivals}
    add(report, outcomes)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
