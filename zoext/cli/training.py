"""The training loop: steps, metrics, evaluations, checkpoints."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from zoext import TrajectoryError, ZerothOrderOptimizer
from zoext.cli import checkpoint, metrics, step
from zoext.cli.errors import UserError, warn, writing
from zoext.cli.evaluation import Evaluation, evaluate
from zoext.cli.interrupt import StopRequest
from zoext.cli.problem import Problem
from zoext.cli.progress import Progress
from zoext.cli.recording import Recording
from zoext.cli.restarting import keep_former, restart
from zoext.cli.run_folder import RunFolder
from zoext.cli.settings import Settings
from zoext.trajectory import VersionError

LOG_EVERY = 10  # steps: reading a loss waits for the device


class Training:
    """A run from where it stands to ``settings.steps``, in ``folder``.

    The record of a step: step, forwards (of the whole run so far), seconds (since this process began to
    train), loss (the mean of the losses that were evaluated). Of an evaluation: ``Evaluation.record``.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: ZerothOrderOptimizer,
        settings: Settings,
        folder: RunFolder,
        device: torch.device,
    ) -> None:
        self.problem = problem
        self.optimizer = optimizer
        self.settings = settings
        self.folder = folder
        self.device = device
        self.step = 0
        self.forwards = 0
        self._unread: list[tuple[dict[str, Any], Tensor]] = []

    def begin(self) -> Recording:
        """Begins to record; nothing was done yet."""
        return Recording.begin(self.folder, self.settings, self.optimizer, self.problem.base)

    def resume(self, saved: checkpoint.Checkpoint | None) -> Recording:
        """Goes to where ``saved`` was written, or to the beginning, and drops the records of later steps."""
        damage = metrics.damage(self.folder.metrics, evaluated=saved is not None)
        if saved is None:
            keep_former(self.folder)
            recording = self.begin()
            self._keep_metrics(damage)
            return recording
        saved.restore(self.problem.model, self.optimizer, self.folder.trajectory)
        self.step, self.forwards = saved.reached.step, saved.reached.forwards
        self._compare_threads(saved.threads)
        recording = self._resume_recording(saved.reached)
        self._keep_metrics(damage)  # now that no other run is writing there
        return recording

    def _keep_metrics(self, damage: str | None) -> None:
        """Drops those of steps that are taken again. Damaged ones stop no run: they are set aside."""
        if damage is None:
            metrics.keep_until(self.folder.metrics, self.step if self.step else -1)
            return
        with writing(self.folder.metrics):
            kept = self.folder.set_aside("metrics", [self.folder.metrics])
        moved = "" if kept is None else f"; what there is of it was moved to {kept}"
        warn(f"{damage}{moved}; metrics begin anew at step {self.step}")

    def _compare_threads(self, before: int) -> None:
        """Products of matrices on a CPU may have other bits with another number of threads."""
        now = torch.get_num_threads()
        if self.device.type == "cpu" and before != now:
            warn(
                f"torch has {now} threads, and the run had {before}: its next steps may have other bits; "
                f"OMP_NUM_THREADS={before} keeps them"
            )

    def _resume_recording(self, reached: checkpoint.Reached) -> Recording:
        try:
            return Recording.resume(self.folder, self.settings, self.optimizer, reached)
        except VersionError as error:  # it is whole, and going on without it would be another run
            raise UserError(str(error)) from None
        except TrajectoryError as damage:
            return restart(damage, self.folder, self.settings, self.optimizer, self.problem)

    def run(self, recording: Recording, stop: StopRequest, progress: Progress) -> None:
        """Trains until the last step or until ``stop`` is received; either way a checkpoint is there."""
        settings = self.settings
        started = time.monotonic()
        if not any("valid_loss" in record for record in metrics.read(self.folder.metrics)):
            self._evaluate(progress, f"step {self.step}" if self.step else "before")
        while self.step < settings.steps and not stop.received:
            with recording.writing():
                loss = self._one_step()
            progress.step(step.forwards_of(self.optimizer))
            record = {"step": self.step, "forwards": self.forwards, "seconds": time.monotonic() - started}
            self._unread.append((record, loss))
            evaluation_due = self.step == settings.steps or self.step % settings.eval_every == 0
            checkpoint_due = self.step % settings.checkpoint_every == 0
            if self.step % LOG_EVERY == 0 or evaluation_due or checkpoint_due:
                progress.loss(self._write_losses())
            if evaluation_due:
                self._evaluate(progress, f"step {self.step}")
            if checkpoint_due:
                self._save(recording)
        self._write_losses()
        self._save(recording)

    def _one_step(self) -> Tensor:
        try:
            loss = step.take(self.problem, self.optimizer, self.settings, self.step, self.device)
        except FloatingPointError as error:
            self._write_losses()
            raise UserError(
                f"step {self.step + 1}: {error}; a smaller --lr or another --mu may help"
            ) from None
        except UserError:
            self._write_losses()
            raise
        self.step += 1
        self.forwards += step.forwards_of(self.optimizer)
        return loss

    def _write_losses(self) -> float:
        """Writes the losses of the steps since the last time; returns their mean."""
        if not self._unread:
            return float("nan")
        losses: list[float] = torch.stack([loss for _, loss in self._unread]).tolist()
        records = [{**record, "loss": loss} for (record, _), loss in zip(self._unread, losses, strict=True)]
        metrics.append(self.folder.metrics, records)
        self._unread.clear()
        return sum(losses) / len(losses)

    def _evaluate(self, progress: Progress, when: str) -> None:
        problem = self.problem
        result: Evaluation = evaluate(
            problem.model, problem.objective, problem.valid, self.settings.batch_size, self.device
        )
        record = {"step": self.step, "forwards": self.forwards, **result.record()}
        metrics.append(self.folder.metrics, [record])
        progress.evaluated(f"{when:>12}: held-out {result}")

    def _save(self, recording: Recording) -> None:
        folder = self.folder.checkpoints
        # The trajectory first: it must never be behind a checkpoint.
        reached = checkpoint.Reached(self.step, self.forwards, recording.position())
        if self.settings.checkpoint == "trajectory":
            checkpoint.save_position(folder, reached)
        else:
            checkpoint.save(folder, reached, self.problem.model, self.optimizer)
