"""One run of a comparison: steps until the budget of forward passes is spent, and evaluations."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from zoext import ZerothOrderOptimizer
from zoext.cli import json_lines, optimizers, step
from zoext.cli.comparison.folder import ComparisonFolder
from zoext.cli.comparison.progress import Progress
from zoext.cli.comparison.records import Outcome, Run
from zoext.cli.comparison.settings import ComparisonSettings
from zoext.cli.comparison.start import Start
from zoext.cli.interrupt import StopRequest
from zoext.cli.json_lines import Record

DIVERGED = 2.0  # times the held-out loss at the start


class Running:
    """A run from its beginning. Its records go to ``folder`` as they come."""

    def __init__(
        self,
        phase: str,
        run: Run,
        start: Start,
        settings: ComparisonSettings,
        folder: ComparisonFolder,
        forwards_a_step: int,
    ) -> None:
        self._run = run
        self._label = run.record(phase)
        self._start = start
        self._settings = settings.of_run(run.method, run.lr, run.seed)
        self._interval = settings.evaluation_interval
        self._folder = folder
        self._forwards_a_step = forwards_a_step
        self._steps = 0
        self._forwards = 0
        self._seconds = 0.0
        self._evaluations: list[Record] = []

    def finish(self, stop: StopRequest, progress: Progress) -> Outcome | None:
        """Takes all the steps that the budget allows; None if ``stop`` is received before they are done.

        A run that diverges ends there, and its outcome says why.
        """
        start = self._start
        self._note_evaluation(None, start.evaluation)
        start.reset()
        optimizer = optimizers.make(start.problem.model, self._settings)
        diverged = None
        while self._affords_a_step and diverged is None:
            diverged = self._until_evaluation(optimizer, stop, progress)
            if stop.received:
                return None
        end = self._note("end", diverged=diverged)
        return Outcome(tuple(self._evaluations), end)

    @property
    def _affords_a_step(self) -> bool:
        return self._forwards + self._forwards_a_step <= self._run.budget

    def _until_evaluation(
        self, optimizer: ZerothOrderOptimizer, stop: StopRequest, progress: Progress
    ) -> str | None:
        """Steps to the next evaluation and takes it. Returns in which way the run diverged, if it did."""
        try:
            training_loss = self._steps_until_due(optimizer, stop, progress)
        except FloatingPointError:
            training_loss = math.nan
        if stop.received:
            return None
        if not math.isfinite(training_loss):
            return f"training loss not finite after {self._forwards} forwards"
        held_out = self._start.evaluate()
        loss, first = held_out["selection_loss"], self._start.evaluation["selection_loss"]
        if not math.isfinite(loss + held_out["report_loss"]):
            return f"held-out loss not finite after {self._forwards} forwards"
        self._note_evaluation(training_loss, held_out)
        if loss > DIVERGED * first:
            return f"held-out loss {loss:.3g} after {self._forwards} forwards, {first:.3g} at the start"
        return None

    def _steps_until_due(
        self, optimizer: ZerothOrderOptimizer, stop: StopRequest, progress: Progress
    ) -> float:
        """Steps until the next multiple of the interval, or as far as the budget goes; their mean loss."""
        due = (self._forwards // self._interval + 1) * self._interval
        losses = []
        began = time.perf_counter()
        try:
            while self._forwards < due and self._affords_a_step and not stop.received:
                start = self._start
                losses.append(step.take(start.problem, optimizer, self._settings, self._steps, start.device))
                forwards = step.forwards_of(optimizer)
                self._steps += 1
                self._forwards += forwards
                progress.step(forwards)
            return torch.stack(losses).mean().item() if losses else math.nan  # waits for the device
        finally:
            self._seconds += time.perf_counter() - began

    def _note_evaluation(self, training_loss: float | None, held_out: Record) -> None:
        self._evaluations.append(self._note("evaluation", training_loss=training_loss, **held_out))

    def _note(self, kind: str, **more: Any) -> Record:
        record = {
            "record": kind,
            **self._label,
            "step": self._steps,
            "forwards": self._forwards,
            "seconds": self._seconds,
            **more,
        }
        json_lines.append(self._folder.runs, [record])
        return record
