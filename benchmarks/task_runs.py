"""The runs of ``tasks.py``: from the same weights, until a budget of forward passes is spent."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import task_data
import torch
from task_data import Examples
from task_methods import METHODS, Learner
from task_plan import FINAL, Record, Run, Start
from torch import nn

from zoext.cli._problem import models
from zoext.cli._problem.evaluation import evaluate
from zoext.cli._problem.steps import batch_indices
from zoext.cli._schedules import Schedule
from zoext.tasks import Encoder, Example, kind_of


@dataclass(frozen=True)
class Protocol:
    """What all runs share.

    Attributes:
        trainable: a regular expression; parameters whose names match are trained.
        per_class: training examples of each label.
        held_out: validation and test examples together, of a seed.
        evaluations: on the validation examples, spread over a final run.
    """

    model: str
    data: str
    dtype: str
    trainable: str
    max_length: int
    batch_size: int
    per_class: int
    held_out: int
    mu: float
    evaluations: int


class Bench:
    """The model, which every run finds with its initial weights, and the data."""

    def __init__(self, protocol: Protocol) -> None:
        base = models.Base(demo=False, task="causal-lm", classes=(), dtype=protocol.dtype, seed=0)
        self.model: nn.Module
        self.model, tokenizer = models.load(protocol.model, base)
        models.choose_trainable(self.model, protocol.trainable)
        self.protocol = protocol
        self._encoder = Encoder(tokenizer, kind_of(self.model.config), protocol.max_length)
        self._initial = {name: each.detach().clone() for name, each in self._trained()}
        self._rows: dict[str, task_data.Rows] = {}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]

    def examples(self, task: str, prompted: bool, seed: int) -> Examples:
        """What ``seed`` uses of a task."""
        if task not in self._rows:
            self._rows[task] = task_data.read(Path(self.protocol.data), task)
        question = task_data.QUESTIONS[task]
        drawn = task_data.draw(
            self._rows[task], question, seed, self.protocol.per_class, self.protocol.held_out
        )
        return task_data.encode(drawn, question.task(prompted=prompted), self._encoder)

    def score(self, examples: Examples, some: Sequence[Example]) -> Record:
        """The loss and the accuracy of the present weights."""
        found = evaluate(self.model, examples.objective, some, self.protocol.batch_size, torch.device("cpu"))
        return {"loss": found.loss.value, "accuracy": found.metrics["accuracy"].value}

    def reset(self) -> None:
        """Restores the initial weights."""
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self._initial[name])

    def start(self, start: Start) -> Record:
        """The scores before any step."""
        examples = self.examples(*start)
        self.reset()
        return {
            "validation": self.score(examples, examples.validation),
            "test": self.score(examples, examples.test),
        }

    def run(self, run: Run) -> Record:
        """Trains; only final runs are tested."""
        examples = self.examples(run.task, run.prompted, run.seed)
        self.reset()
        began = time.monotonic()
        try:
            spent, curve, diverged = self._train(run, examples)
            test = self.score(examples, examples.test) if run.phase == FINAL and not diverged else None
            diverged = diverged or (test is not None and not math.isfinite(test["loss"]))
        finally:
            self.reset()
        seconds = round(time.monotonic() - began, 1)
        return {"spent": spent, "curve": curve, "diverged": diverged, "test": test, "seconds": seconds}

    def _train(self, run: Run, examples: Examples) -> tuple[int, list[Record], bool]:
        """The forward passes spent, the validation scores on the way, and whether the run diverged."""
        method = METHODS[run.method]
        learner = method.make(self.model, examples.objective, self.protocol.mu, run.seed)
        schedule = Schedule(run.schedule, run.forwards)
        count = self.protocol.evaluations if run.phase == FINAL else 1
        due = [run.forwards * number // count for number in range(1, count + 1)]
        spent, steps, curve = 0, 0, []
        while spent + method.forwards <= run.forwards:
            batch = self._batch(run.seed, steps, examples)
            loss, cost = _step(learner, batch, run.lr * schedule.factor(spent, method.forwards))
            spent, steps = spent + cost, steps + 1
            if not math.isfinite(loss):
                return spent, curve, True
            if spent + method.forwards > due[0]:
                scores = self.score(examples, examples.validation)
                if not math.isfinite(scores["loss"]):
                    return spent, curve, True
                curve.append({"forwards": spent, **scores})
                due = [each for each in due if spent + method.forwards <= each]
        return spent, curve, False

    def _batch(self, seed: int, step: int, examples: Examples) -> Any:
        chosen = batch_indices(seed, step, self.protocol.batch_size, len(examples.train))
        return examples.objective.collate([examples.train[index] for index in chosen])


def _step(learner: Learner, batch: Any, lr: float) -> tuple[float, int]:
    try:
        loss, cost = learner.step(batch, lr)
    except FloatingPointError:  # of an optimizer whose losses are not finite
        return math.nan, 0
    return loss.item(), cost
