"""One run of a comparison: steps and evaluations until its budget of forward passes is spent."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any, Self

import torch

from zoext import ZerothOrderOptimizer
from zoext.cli._bars import bar
from zoext.cli._comparison.plan import FINAL
from zoext.cli._comparison.records import Outcome, Run
from zoext.cli._comparison.settings import ComparisonFolder, ComparisonSettings
from zoext.cli._comparison.start import Start
from zoext.cli._errors import warn
from zoext.cli._problem import optimizers, steps
from zoext.cli._runs import records
from zoext.cli._runs.outcome import DIVERGED
from zoext.cli._runs.records import Record
from zoext.cli._runs.slopes import SlopeWatch, told_by_the_command
from zoext.cli._schedules import CONSTANT, Schedules
from zoext.cli._terminal import StopRequest


class Progress:
    """A bar over the forward passes of all remaining runs, labelled with the current one."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = bar("forward", 0, 0, quiet)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._bar.close()

    def begin(self, run: Run, to_do: int) -> None:
        """Shows ``run``; ``to_do`` forward passes are left, including its own."""
        self._bar.total = self._bar.n + to_do
        self._bar.set_description_str(_describe(run))

    def step(self, forwards: int) -> None:
        """Counts one step of ``forwards`` forward passes."""
        self._bar.update(forwards)

    def end(self, phase: str, run: Run, outcome: Outcome) -> None:
        """Prints a line above the bar about a finished run, with the loss that matters in its phase."""
        if self._quiet:
            return
        name = "report_loss" if phase == FINAL else "selection_loss"
        losses = [evaluation[name] for evaluation in outcome.evaluations]
        result = f"held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        if outcome.diverged:
            result = f"diverged: {outcome.end['diverged']}"
        self._bar.write(f"{phase}: {_describe(run)}: {result}")


def _describe(run: Run) -> str:
    schedule = "" if run.schedule == CONSTANT else f" {run.schedule}"
    return f"{run.method} lr {run.lr:.3g}{schedule} seed {run.seed}"


class Running:
    """A run from its start, recorded in ``folder``."""

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
        self._settings = settings.of_run(run.method, run.lr, run.seed, run.schedule)
        self._schedules = Schedules.of(self._settings, run.schedule, run.budget)
        self._interval = settings.evaluation_interval
        self._folder = folder
        self._forwards_a_step = forwards_a_step
        self._slopes = SlopeWatch(self._settings, run.budget // forwards_a_step)
        self._steps = 0
        self._forwards = 0
        self._seconds = 0.0
        self._evaluations: list[Record] = []

    def finish(self, stop: StopRequest, progress: Progress) -> Outcome | None:
        """Takes all steps that the budget allows; returns None if ``stop`` is received before.

        A run that diverges ends there, and its outcome has the reason.
        """
        start = self._start
        self._note_evaluation(None, start.evaluation)
        start.reset()
        optimizer = optimizers.make(start.problem.model, self._settings, start.ranks)
        diverged = None
        while self._affords_a_step and diverged is None:
            with told_by_the_command():
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
        """Takes the steps to the next evaluation, and evaluates. Returns why the run diverged, if it did."""
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
        """Steps to the next multiple of the interval, or to the end of the budget; returns the mean loss."""
        due = (self._forwards // self._interval + 1) * self._interval
        losses, flat = [], []
        began = time.perf_counter()
        try:
            while self._forwards < due and self._affords_a_step and not stop.poll():
                start = self._start
                self._schedules.set(optimizer.param_groups, self._forwards, self._forwards_a_step)
                losses.append(
                    steps.take(
                        start.problem, optimizer, self._settings, self._steps, start.device, start.ranks
                    )
                )
                flat.append(steps.is_flat(optimizer))
                forwards = steps.forwards_of(optimizer)
                self._steps += 1
                self._forwards += forwards
                progress.step(forwards)
            if not losses:
                return math.nan
            self._tell_of_slopes(torch.stack(flat).tolist())  # synchronizes with the device
            return torch.stack(losses).mean().item()
        finally:
            self._seconds += time.perf_counter() - began

    def _tell_of_slopes(self, are_flat: list[bool]) -> None:
        if (found := self._slopes.note(are_flat)) is not None:
            self._start.ranks.first(warn, f"{_describe(self._run)}: {found}")

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
        self._start.ranks.first(records.append, self._folder.runs, [record])
        return record
