"""The training loop: steps, metrics, evaluations and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoext import ZerothOrderOptimizer
from zoext.cli._errors import UserError, warn
from zoext.cli._failures import of_model
from zoext.cli._problem import steps
from zoext.cli._problem.evaluation import Evaluation, evaluate
from zoext.cli._problem.problem import Problem
from zoext.cli._ranks import Ranks
from zoext.cli._runs import checkpoint, outcome, records
from zoext.cli._runs.best import Copies, best_of, without_improvement
from zoext.cli._runs.checkpoint import Reached
from zoext.cli._runs.folder import RunFolder
from zoext.cli._runs.logs import Log
from zoext.cli._runs.records import Record
from zoext.cli._runs.slopes import SlopeWatch, told_by_the_command
from zoext.cli._runs.trajectory import Recording, obstacle
from zoext.cli._schedules import Schedules
from zoext.cli._settings import Settings
from zoext.cli._terminal import Progress, StopRequest

_LOG_EVERY = 10  # steps: reading a loss synchronizes with the device


class Training:
    """Trains from the step that was ``reached`` to ``settings.steps``; the first rank writes into ``folder``.

    The metrics of a step are step, forwards (of the whole run so far), seconds (since this process began to
    train), lr, mu and loss (the mean of the losses of its probes). Those of an evaluation are step, forwards,
    seconds, ``Evaluation.record``, for a language model valid_perplexity, and change, the difference to
    the first evaluation, with the standard error of the paired difference.

    Attributes:
        stopped_early: whether ``settings.patience`` has ended the run.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: ZerothOrderOptimizer,
        settings: Settings,
        folder: RunFolder,
        device: torch.device,
        reached: Reached,
        ranks: Ranks,
    ) -> None:
        self.problem = problem
        self.optimizer = optimizer
        self.settings = settings
        self.folder = folder
        self.device = device
        self.step = reached.step
        self.forwards = reached.forwards
        self.stopped_early = False
        self._ranks = ranks
        self._schedules = Schedules.of(settings, settings.schedule, settings.steps)
        self._unread: list[tuple[Record, Tensor]] = []  # a loss, and whether those of all probes were equal
        self._slopes = SlopeWatch(settings, settings.steps)
        self._evaluations: list[Record] = []  # on the first rank only, as everything that follows
        self._best_at_checkpoint: int | None = None
        self._copies_best = False

    @property
    def is_done(self) -> bool:
        return self.step >= self.settings.steps or self.stopped_early

    @property
    def without_slope(self) -> str | None:
        """What to say if the last steps had no slope."""
        return self._slopes.finding

    @property
    def is_replayable(self) -> bool:
        """Whether the trajectory leads to the model of every step, bit for bit."""
        return obstacle(self.settings, self.optimizer) is None

    def run(
        self, recording: Recording, stop: StopRequest, progress: Progress, logs: Sequence[Log] = ()
    ) -> None:
        """Trains until the run is done or until ``stop`` is received, and then writes a checkpoint.

        The first rank also writes its metrics to ``logs``.
        """
        with told_by_the_command():
            self._run(recording, stop, progress, logs)

    def _run(self, recording: Recording, stop: StopRequest, progress: Progress, logs: Sequence[Log]) -> None:
        self._logs = logs
        self._started = time.monotonic()
        self._ranks.first(self._continue_evaluations, recording)
        if self._ranks.any(bool(self._ranks.first(self._lacks_evaluation))):
            self._evaluate(progress, f"step {self.step}" if self.step else "before")
        self._stop_without_patience()
        while not self.is_done and not stop.poll():
            with recording.writing():
                loss = self._one_step()
            progress.step(steps.forwards_of(self.optimizer))
            self._unread.append((self._record(), torch.stack((loss, steps.is_flat(self.optimizer)))))
            checkpoint_due = self.step % self.settings.checkpoint_every == 0
            if self.step % _LOG_EVERY == 0 or self._evaluation_due or checkpoint_due:
                progress.loss(self._write_losses())
            if self._evaluation_due:
                self._evaluate(progress, f"step {self.step}")
                self._stop_without_patience()
            if checkpoint_due:
                self._ranks.first(self._save, recording)
        self._write_losses()
        self._ranks.first(self._save, recording)

    @property
    def _evaluation_due(self) -> bool:
        return self.step == self.settings.steps or self.step % self.settings.eval_every == 0

    def _continue_evaluations(self, recording: Recording) -> None:
        metrics = records.read_metrics(self.folder.metrics)
        self._evaluations = [record for record in metrics if "valid_loss" in record]
        self._copies_best = self.settings.keep == "best" and not (recording.is_on and self.is_replayable)
        copies = Copies(self.folder.best)
        copies.keep([step for step in copies.steps if step <= self.step])
        self._best_at_checkpoint = self._best_step

    def _lacks_evaluation(self) -> bool:
        """Whether there is none so far, or a process was stopped between a step and its evaluation."""
        evaluated = [record["step"] for record in self._evaluations]
        return not evaluated or (self._evaluation_due and self.step not in evaluated)

    @property
    def _best_step(self) -> int | None:
        best = best_of(self._evaluations)
        return None if best is None else int(best["step"])

    def _stop_without_patience(self) -> None:
        patience = self.settings.patience
        if patience is not None:
            is_out = self._ranks.first(lambda: without_improvement(self._evaluations) >= patience)
            self.stopped_early = self._ranks.any(bool(is_out))

    def _one_step(self) -> Tensor:
        self._schedules.set(self.optimizer.param_groups, self.step)
        try:
            loss = steps.take(
                self.problem, self.optimizer, self.settings, self.step, self.device, self._ranks
            )
        except FloatingPointError as error:
            self._write_losses()
            raise UserError(outcome.of_divergence(error, self.step + 1, self.settings)) from None
        except UserError:
            self._write_losses()
            raise
        self.step += 1
        self.forwards += steps.forwards_of(self.optimizer)
        return loss

    def _record(self) -> Record:
        group = self.optimizer.param_groups[0]
        return {**self._position(), "lr": group["lr"], "mu": group["mu"]}

    def _position(self) -> Record:
        seconds = time.monotonic() - self._started
        return {"step": self.step, "forwards": self.forwards, "seconds": seconds}

    def _write_losses(self) -> float:
        """Writes the metrics of the steps since the last call; returns their mean loss."""
        if not self._unread:
            return math.nan
        losses, are_flat = torch.stack([found for _, found in self._unread], 1).tolist()
        new = [{**record, "loss": loss} for (record, _), loss in zip(self._unread, losses, strict=True)]
        self._ranks.first(self._append, new)
        self._unread.clear()
        if (found := self._slopes.note(are_flat)) is not None:
            self._ranks.first(warn, found)
        return float(sum(losses) / len(losses))

    def _evaluate(self, progress: Progress, when: str) -> None:
        problem, size = self.problem, self.settings.at_once
        with of_model(f"held-out examples at step {self.step}"):
            result: Evaluation = evaluate(
                problem.model, problem.objective, problem.valid, size, self.device, self._ranks
            )
        self._ranks.first(self._note_evaluation, result)
        progress.evaluated(f"{when:>12}: held-out {result}")

    def _note_evaluation(self, result: Evaluation) -> None:
        record: dict[str, Any] = {**self._position(), **result.record()}
        if self.problem.objective.is_per_token:
            record["valid_perplexity"] = outcome.perplexity(result.loss.value)
        if not self._evaluations:
            outcome.write_first(self.folder.first_evaluation, result)
        record |= outcome.change(self.folder.first_evaluation, result)
        self._append([record])
        self._evaluations.append(record)
        if self._copies_best and self._best_step == self.step:
            spared = () if self._best_at_checkpoint is None else (self._best_at_checkpoint,)
            Copies(self.folder.best).save(self.step, self.problem.model, spared)

    def _append(self, new: Sequence[Record]) -> None:
        records.append(self.folder.metrics, new)
        for log in self._logs:
            for record in new:
                log.write(record)

    def _save(self, recording: Recording) -> None:
        folder = self.folder.checkpoints
        # The trajectory first: it must never be behind a checkpoint.
        reached = Reached(self.step, self.forwards, recording.position())
        parts = self._ranks.batch_parts(self.settings.parallel)
        if self.settings.checkpoint == "trajectory":
            checkpoint.save_position(folder, reached, parts)
        else:
            checkpoint.save(folder, reached, self.problem.model, self.optimizer, parts)
        self._best_at_checkpoint = self._best_step
