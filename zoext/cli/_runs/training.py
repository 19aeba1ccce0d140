"""The training loop: steps, metrics, evaluations and checkpoints."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from zoext import ZerothOrderOptimizer
from zoext.cli._errors import UserError
from zoext.cli._problem import steps
from zoext.cli._problem.evaluation import Evaluation, evaluate
from zoext.cli._problem.problem import Problem
from zoext.cli._ranks import Ranks
from zoext.cli._runs import checkpoint, records
from zoext.cli._runs.checkpoint import Reached
from zoext.cli._runs.folder import RunFolder
from zoext.cli._runs.trajectory import Recording
from zoext.cli._schedules import Schedules
from zoext.cli._settings import Settings
from zoext.cli._terminal import Progress, StopRequest

_LOG_EVERY = 10  # steps: reading a loss synchronizes with the device


class Training:
    """Trains from the step that was ``reached`` to ``settings.steps``; the first rank writes into ``folder``.

    The metrics of a step are step, forwards (of the whole run so far), seconds (since this process began to
    train) and loss (the mean of the losses of its probes); those of an evaluation ``Evaluation.record``.
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
        self._ranks = ranks
        self._schedules = Schedules.of(settings, settings.schedule, settings.steps)
        self._unread: list[tuple[dict[str, Any], Tensor]] = []

    @property
    def is_done(self) -> bool:
        return self.step >= self.settings.steps

    def run(self, recording: Recording, stop: StopRequest, progress: Progress) -> None:
        """Trains until the last step or until ``stop`` is received, and then writes a checkpoint."""
        settings = self.settings
        started = time.monotonic()
        if self._ranks.any(bool(self._ranks.first(self._lacks_evaluation))):
            self._evaluate(progress, f"step {self.step}" if self.step else "before")
        while not self.is_done and not stop.poll():
            with recording.writing():
                loss = self._one_step()
            progress.step(steps.forwards_of(self.optimizer))
            group = self.optimizer.param_groups[0]
            record = {
                "step": self.step,
                "forwards": self.forwards,
                "seconds": time.monotonic() - started,
                "lr": group["lr"],
                "mu": group["mu"],
            }
            self._unread.append((record, loss))
            evaluation_due = self.step == settings.steps or self.step % settings.eval_every == 0
            checkpoint_due = self.step % settings.checkpoint_every == 0
            if self.step % _LOG_EVERY == 0 or evaluation_due or checkpoint_due:
                progress.loss(self._write_losses())
            if evaluation_due:
                self._evaluate(progress, f"step {self.step}")
            if checkpoint_due:
                self._ranks.first(self._save, recording)
        self._write_losses()
        self._ranks.first(self._save, recording)

    def _lacks_evaluation(self) -> bool:
        return not any("valid_loss" in record for record in records.read_metrics(self.folder.metrics))

    def _one_step(self) -> Tensor:
        self._schedules.set(self.optimizer.param_groups, self.step)
        try:
            loss = steps.take(
                self.problem, self.optimizer, self.settings, self.step, self.device, self._ranks
            )
        except FloatingPointError as error:
            self._write_losses()
            raise UserError(
                f"step {self.step + 1}: {error}; a smaller --lr or another --mu may help"
            ) from None
        except UserError:
            self._write_losses()
            raise
        self.step += 1
        self.forwards += steps.forwards_of(self.optimizer)
        return loss

    def _write_losses(self) -> float:
        """Writes the metrics of the steps since the last call; returns their mean loss."""
        if not self._unread:
            return float("nan")
        losses: list[float] = torch.stack([loss for _, loss in self._unread]).tolist()
        new = [{**record, "loss": loss} for (record, _), loss in zip(self._unread, losses, strict=True)]
        self._ranks.first(records.append, self.folder.metrics, new)
        self._unread.clear()
        return sum(losses) / len(losses)

    def _evaluate(self, progress: Progress, when: str) -> None:
        problem, size = self.problem, self.settings.batch_size
        result: Evaluation = evaluate(
            problem.model, problem.objective, problem.valid, size, self.device, self._ranks
        )
        record = {"step": self.step, "forwards": self.forwards, **result.record()}
        self._ranks.first(records.append, self.folder.metrics, [record])
        progress.evaluated(f"{when:>12}: held-out {result}")

    def _save(self, recording: Recording) -> None:
        folder = self.folder.checkpoints
        # The trajectory first: it must never be behind a checkpoint.
        reached = Reached(self.step, self.forwards, recording.position())
        parts = self._ranks.batch_parts(self.settings.parallel)
        if self.settings.checkpoint == "trajectory":
            checkpoint.save_position(folder, reached, parts)
        else:
            checkpoint.save(folder, reached, self.problem.model, self.optimizer, parts)
