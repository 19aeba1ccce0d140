"""What a step of each method takes: forward passes and memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zoext._benchmarking.memory import peak
from zoext.cli import optimizers, step
from zoext.cli.comparison.settings import ComparisonSettings
from zoext.cli.comparison.start import Start
from zoext.cli.errors import UserError
from zoext.cli.json_lines import Record

STEPS = 2  # the second has what the first left behind
LR = 1e-12  # costs what any other costs, and cannot diverge


def measure_missing(start: Start, settings: ComparisonSettings, known: Mapping[str, Record]) -> list[Record]:
    """The records of kind "method" that are not ``known`` yet; the weights are put back.

    Raises:
        UserError: if a step takes more forwards than a run has.
    """
    missing = [method for method in settings.optimizers if method not in known]
    forward = _peak_of_forwards(start, settings) if missing else 0
    measured = [_measure(start, settings, method, forward) for method in missing]
    for record in [*known.values(), *measured]:
        if record["method"] in settings.optimizers:
            _check_affordable(record, settings)
    return measured


def _peak_of_forwards(start: Start, settings: ComparisonSettings) -> int:
    """The peak of memory of plain forwards on the batches of the first steps."""
    problem, of_run = start.problem, settings.of_run(settings.optimizers[0], LR, seed=0)

    @torch.no_grad()
    def forwards() -> None:
        for number in range(STEPS):
            batch = step.batch(problem, of_run, number, start.device)
            problem.objective.scores(problem.model, batch).mean_loss()

    return peak(forwards, start.device)


def _measure(start: Start, settings: ComparisonSettings, method: str, forward: int) -> Record:
    """Forwards of a step, and the peak from the making of the optimizer to the end of its second step."""
    of_run = settings.of_run(method, LR, seed=0)
    taken: list[int] = []

    def first_steps() -> None:
        optimizer = optimizers.make(start.problem.model, of_run)
        for number in range(STEPS):
            step.take(start.problem, optimizer, of_run, number, start.device)
            taken.append(step.forwards_of(optimizer))

    try:
        extra = peak(first_steps, start.device) - forward
    except FloatingPointError as error:
        raise UserError(f"{method}: {error}; another --mu may help") from None
    finally:
        start.reset()
    return {"record": "method", "method": method, "forwards_a_step": max(taken), "extra_bytes": extra}


def _check_affordable(cost: Record, settings: ComparisonSettings) -> None:
    needed = cost["forwards_a_step"]
    budgets = {"--forwards": settings.forwards, "--sweep-forwards": settings.sweep_budget}
    for option, budget in budgets.items():
        if needed > budget:
            raise UserError(
                f"{option} {budget}: a step of {cost['method']} takes {needed}; give at least as many"
            )
