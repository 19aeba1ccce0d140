"""Restores model and optimizer of a run to the newest step that its files lead to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zoext import TrajectoryError, ZerothOrderOptimizer, replay
from zoext.cli._errors import UserError, warn
from zoext.cli._problem.problem import Problem
from zoext.cli._runs import checkpoint, records
from zoext.cli._runs.checkpoint import Checkpoint, CorruptedError, Position, Reached
from zoext.cli._runs.folder import RunFolder
from zoext.cli._runs.tensors import put, tensors_of
from zoext.cli._runs.trajectory import obstacle
from zoext.cli._settings import Settings
from zoext.trajectory import NOISE_FIELD, VersionError, last_whole_step, read_until


@dataclass(frozen=True)
class Restored:
    """The step that a run continues from; ``saved`` is its checkpoint, None if it has none so far."""

    reached: Reached
    saved: Checkpoint | None

    def __str__(self) -> str:
        how = "replayed from the trajectory, without a checkpoint" if self.saved is None else "a checkpoint"
        return f"resumed from step {self.reached.step} ({how})"


def restore_newest(
    folder: RunFolder, settings: Settings, problem: Problem, optimizer: ZerothOrderOptimizer
) -> Restored | None:
    """Restores model and optimizer from the newest checkpoint, or by replay before there is one.

    Changes no file.

    Returns:
        What the run continues from; None if it starts again.
    """
    saved = newest_checkpoint(folder.checkpoints)
    if saved is None:
        reached = _replayed(folder, settings, optimizer)
        return None if reached is None else Restored(reached, None)
    if saved.reached.step > settings.steps:
        at = saved.reached.step
        raise UserError(f"--steps {settings.steps}: the run in {folder.path} is already at step {at}")
    restore(saved, problem.model, optimizer, folder.trajectory)
    return Restored(saved.reached, saved)


def _replayed(folder: RunFolder, settings: Settings, optimizer: ZerothOrderOptimizer) -> Reached | None:
    """Replays the steps of a run that was stopped before its first checkpoint; None if nothing has moved."""
    if obstacle(settings, optimizer) is not None:
        return None
    try:
        # Either file may lack the last steps of the other, since none waits for the other. The run continues
        # from the last step that both have.
        whole = read_until(folder.trajectory, None).end
        last = min(settings.steps, whole, last_whole_step(folder.trajectory) or 0)
        taken = [
            record
            for record in records.read_metrics(folder.metrics)
            if "loss" in record and record["step"] <= last
        ]
        if not taken:
            return None
        step, forwards = taken[-1]["step"], taken[-1]["forwards"]
        reached = Reached(step, forwards, Position.of_steps(folder.trajectory, step))
        replay(optimizer, folder.trajectory, to_step=step)
    except (UserError, ValueError, OSError):  # corrupted: the run starts again
        return None
    return reached


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Reads and verifies the newest checkpoint below ``folder``; None if there is none.

    Raises:
        UserError: if it is corrupted, with the remedy, or if the noise field has changed since.
    """
    found = checkpoint.existing(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        saved = checkpoint.read(newest)
    except CorruptedError as error:
        remedy = (
            f"remove {newest} to resume from {found[-2].name}"
            if len(found) > 1
            else f"remove {newest} to start again and keep the trajectory for zoext replay, or start again "
            "with --overwrite"
        )
        raise UserError(f"{error}; {remedy}") from None
    if saved.noise_field != NOISE_FIELD:
        raise UserError(
            f"{saved.state}: noise_field is {saved.noise_field}, this zoext has {NOISE_FIELD}; resume with "
            "the zoext that the run began with"
        )
    return saved


def restore(saved: Checkpoint, model: nn.Module, optimizer: ZerothOrderOptimizer, trajectory: Path) -> None:
    """Restores model and optimizer, which are as the run began, to the state at the checkpoint.

    Raises:
        UserError: for another model or, without weights, a trajectory that does not lead to the checkpoint.
    """
    if saved.saved is not None:
        _check_fits(saved.path, saved.saved.weights, model)
        optimizer.load_state_dict(saved.saved.optimizer)
        put(model, saved.saved.weights)
        return
    try:
        saved.reached.check(trajectory)
        replay(optimizer, trajectory, to_step=saved.reached.step)
    except VersionError as error:
        raise UserError(str(error)) from None
    except ValueError as error:
        raise UserError(f"{error}; {_remedy(saved, trajectory)}") from None


def _check_fits(path: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Raises a UserError unless names, shapes and dtypes are those of ``model``."""
    theirs, ours = _outline(weights), _outline(tensors_of(model))
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"{path}: model mismatch: {name} is {theirs.get(name, 'absent')} there and "
            f"{ours.get(name, 'absent')} here; resume with the model of that run, or give another --out"
        )


def _outline(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def _remedy(saved: Checkpoint, trajectory: Path) -> str:
    """What can be done about a trajectory that does not lead to a checkpoint without weights."""
    if _is_intact(saved, trajectory):
        return "resume with the model, the data and the versions that the run began with"
    last = last_whole_step(trajectory)
    rest = f"zoext replay BASE {trajectory} --to-step {last} --out DIR still recovers that model; "
    older = [path for path in checkpoint.existing(saved.path.parent) if path < saved.path]
    if older and _leads_to(older[-1], trajectory):
        remedy = f"remove {saved.path} to resume from {older[-1].name}"
    else:
        remedy = "restore the file of this run, or start again with --overwrite"
    return ("" if last is None else rest) + remedy


def _is_intact(saved: Checkpoint, trajectory: Path) -> bool:
    try:
        saved.reached.check(trajectory)
    except TrajectoryError:
        return False
    return (last_whole_step(trajectory) or 0) >= saved.reached.step


def _leads_to(path: Path, trajectory: Path) -> bool:
    """Whether a run can be resumed from the checkpoint ``path``."""
    try:
        found = checkpoint.read(path)
    except CorruptedError:
        return False
    return found.saved is not None or _is_intact(found, trajectory)


def compare_processes(saved: Checkpoint, device: torch.device, batch_parts: int) -> None:
    """Warns if the bits of the next steps depend on what was different when the checkpoint was written."""
    # On a CPU the bits of matrix products may depend on the number of threads.
    before, now = saved.threads, torch.get_num_threads()
    if device.type == "cpu" and before != now:
        warn(
            f"torch has {now} threads, and the run had {before}: the bits of its next steps may differ; "
            f"give --threads {before} to keep them"
        )
    if saved.batch_parts != batch_parts:
        warn(
            f"each batch is divided by {batch_parts}, and was by {saved.batch_parts}: the next losses may be "
            "rounded differently; start as many processes as before to keep the bits of the run, or give "
            "--parallel probes if it was 1"
        )
