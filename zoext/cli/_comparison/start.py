"""The common start of all runs of a comparison, and the cost of a step of each method."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch

from zoext._benchmarking.memory import peak
from zoext.cli._comparison.settings import ComparisonSettings
from zoext.cli._errors import UserError
from zoext.cli._failures import not_finite, of_model
from zoext.cli._problem import optimizers, steps
from zoext.cli._problem.evaluation import evaluate
from zoext.cli._problem.problem import Problem
from zoext.cli._ranks import Ranks
from zoext.cli._runs import tensors
from zoext.cli._runs.records import Record
from zoext.tasks import Example

_STEPS = 2  # the second runs with the state that the first allocated
_LR = 1e-12  # cannot diverge, and the cost does not depend on it


class Start:
    """A model at its initial weights, and two halves of the held-out examples.

    The loss on the examples that select a learning rate is biased downwards. Therefore one half selects and
    the other is reported.

    Attributes:
        evaluation: the result of ``evaluate`` at the initial weights.
        fingerprint: a hash of examples and weights, which must be the same when a comparison is resumed.

    Raises:
        UserError: if there are too few held-out examples, or the loss of one half is not finite.
    """

    def __init__(self, problem: Problem, at_once: int, device: torch.device, ranks: Ranks) -> None:
        self.problem = problem
        self.device = device
        self.ranks = ranks
        self.selection, self.report = halves(problem.valid)
        self._at_once = at_once
        self._weights = tensors.copy_of(problem.model)
        self.fingerprint = f"{problem.fingerprint()} {tensors.digest(problem.model)}"
        self.evaluation = self.evaluate()
        if not math.isfinite(self.evaluation["selection_loss"] + self.evaluation["report_loss"]):
            raise UserError(
                "the held-out loss is not finite before the first step; give another --model, or "
                "--dtype float32"
            )

    def reset(self) -> None:
        """Restores the initial weights."""
        tensors.put(self.problem.model, self._weights)

    def evaluate(self) -> Record:
        """Loss and accuracy of the current model on each half, with standard errors over examples."""
        record: Record = {}
        for part, examples in (("selection", self.selection), ("report", self.report)):
            problem = self.problem
            with of_model("held-out examples"):
                result = evaluate(
                    problem.model, problem.objective, examples, self._at_once, self.device, self.ranks
                )
            record |= result.record(part)
        return record


def halves(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Splits by a hash of the tokens: equal texts are in the same half, and the split is reproducible."""
    order = sorted({example.tokens for example in examples}, key=_digest)
    if len(order) < 4:  # a standard error needs two in each half
        raise UserError(
            f"only {len(order)} distinct held-out texts, too few to select the learning rate on one half "
            "and report the other; give a larger --validation-fraction or --valid-data"
        )
    first = set(order[: len(order) // 2])
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[example.tokens not in first].append(example)
    return parts


def _digest(tokens: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(repr(tokens).encode(), digest_size=16).digest()


def measure_missing(start: Start, settings: ComparisonSettings, known: Mapping[str, Record]) -> list[Record]:
    """Measures the methods that are not ``known`` and returns their records; restores the weights.

    Raises:
        UserError: if a step takes more forward passes than a run may.
    """
    missing = [method for method in settings.optimizers if method not in known]
    forward = _peak_of_forwards(start, settings) if missing else 0
    measured = [_measure(start, settings, method, forward) for method in missing]
    for record in [*known.values(), *measured]:
        if record["method"] in settings.optimizers:
            _check_affordable(record, settings)
    return measured


def _peak_of_forwards(start: Start, settings: ComparisonSettings) -> int:
    """The peak memory of forward passes on the batches of the first steps."""
    problem, of_run = start.problem, settings.of_run(settings.optimizers[0], _LR, seed=0)

    @torch.no_grad()
    def forwards() -> None:
        for number in range(_STEPS):
            pieces = steps.batches(problem, of_run, number, start.device)
            with of_model(f"step {number + 1}"):
                steps.scores_of(problem, pieces).mean_loss()

    return peak(forwards, start.device)


def _measure(start: Start, settings: ComparisonSettings, method: str, forward: int) -> Record:
    """Forward passes per step, and the peak memory from the construction of the optimizer on."""
    of_run = settings.of_run(method, _LR, seed=0)
    taken: list[int] = []

    def first_steps() -> None:
        optimizer = optimizers.make(start.problem.model, of_run, start.ranks)
        for number in range(_STEPS):
            steps.take(start.problem, optimizer, of_run, number, start.device, start.ranks)
            taken.append(steps.forwards_of(optimizer))

    try:
        extra = peak(first_steps, start.device) - forward
    except FloatingPointError as error:
        raise UserError(f"{method}: {not_finite(error)}; give another --mu") from None
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
