"""Resuming: what is checked, what stops it, what is set aside and what starts again.

``zoext finetune --resume`` continues from the newest checkpoint, or from the last recorded step if there is
none yet and the trajectory can be replayed. It ends with the bits of a run that was
never interrupted. It stops with a UserError, having changed nothing, if

- an option differs from the stored settings, unless it is in ``FINETUNE_CHANGES``, or the settings are
  corrupted, edited or of another version (``OutputFolder.read_note``);
- the data, the model or the version of the noise field do not match those of the run;
- the newest checkpoint is corrupted, or is already past ``--steps``;
- the trajectory is of another version, is being written by another process, or is corrupted or does not match
  although it is needed: by a checkpoint without weights, or for ``--checkpoint trajectory``.

It warns and continues if

- the metrics are corrupted or missing: they are set aside and restart at the current step;
- the trajectory is corrupted, missing or does not match a checkpoint with weights: it is set aside, and a new
  one begins at the step of the checkpoint, with the model of that step beside it. An optimizer that remembers
  steps, which cannot begin one, continues without;
- there is no checkpoint, and the trajectory cannot be replayed: the run starts again from its first step, and
  a trajectory with steps is set aside;
- torch has another number of threads than before, or batches are divided over another number of processes.

A run that torchrun has restarted is resumed by itself, since its note has the identity of the launch.

Files are set aside by moving them to ``OUT/corrupted``. Nothing is set aside while another process writes it.

``zoext compare --resume`` keeps finished runs and discards interrupted ones. It stops if an option that is
not in ``COMPARE_CHANGES``, the model or the data differ, or if its records are corrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from zoext import TrajectoryError, ZerothOrderOptimizer
from zoext.cli._errors import UserError, warn, writing
from zoext.cli._options import Request
from zoext.cli._problem.problem import Problem
from zoext.cli._runs import records
from zoext.cli._runs.checkpoint import Reached
from zoext.cli._runs.folder import OutputFolder, RunFolder
from zoext.cli._runs.results import write_model
from zoext.cli._runs.trajectory import Recording, check_not_written, writing_trajectory
from zoext.cli._schedules import CONSTANT
from zoext.cli._settings import Settings, SettingsT
from zoext.trajectory import VersionError, open_recording, remembers

#: Settings that may change when a run is resumed: none affects what a step does, except for its rounding.
FINETUNE_CHANGES = frozenset(
    {
        *("steps", "device", "threads", "parallel", "eval_every", "checkpoint_every", "checkpoint"),
        *("keep", "patience", "log"),
    }
)

#: Settings that may change when a comparison is resumed: they select its runs and affect none of them.
COMPARE_CHANGES = frozenset(
    {
        *("optimizers", "lr", "lrs", "lr_factors", "schedules", "forwards", "seeds"),
        *("sweep_forwards", "sweep_seeds"),
    }
)


def continued(request: Request, folder: OutputFolder[SettingsT]) -> Request:
    """The request, which resumes the run in ``folder`` if torchrun has restarted it."""
    return dataclasses.replace(request, resume=True, overwrite=False) if folder.is_restarted else request


def settings_of(
    request: Request, folder: OutputFolder[SettingsT], defaults: SettingsT, changes: Collection[str]
) -> SettingsT:
    """The settings of a new run, or of the one to resume. Nothing is written yet.

    Raises:
        UserError: if the run would replace files that are not its own or its inputs, if there is none to
            resume, or if an option outside ``changes`` differs from its settings.
    """
    if not request.resume:
        settings = dataclasses.replace(defaults, **request.given)
        folder.check_spares_inputs(settings)
        folder.check_free(request.overwrite)
        return settings
    stored, _ = folder.read_note()
    folder.check_spares_inputs(stored)
    for name, value in request.given.items():
        if name not in changes and value != getattr(stored, name):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {value}: the run in {folder.path} has {getattr(stored, name)}; "
                f"omit {option} to resume it"
            )
    return dataclasses.replace(stored, **request.given)


def check_schedule(folder: RunFolder, settings: Settings) -> None:
    """Raises a UserError for another number of steps if the steps already taken depend on it."""
    stored, _ = folder.read_note()
    schedules = {"--schedule": stored.schedule, "--mu-schedule": stored.mu_schedule}
    for option, shape in schedules.items():
        if shape != CONSTANT and settings.steps != stored.steps:
            raise UserError(
                f"--steps {settings.steps}: {option} {shape} of the run in {folder.path} ends at step "
                f"{stored.steps}; omit --steps to resume it, or begin a new run with --model {folder.model}"
            )


def check_inputs(folder: OutputFolder[SettingsT], fingerprint: str, what: str) -> None:
    """Raises a UserError unless ``what`` has the fingerprint that the run stored."""
    if folder.read_note()[1] != fingerprint:
        raise UserError(
            f"--out {folder.path}: {what} mismatch; resume with the {what} that the run began with, "
            "or give another --out"
        )


def continue_files(
    folder: RunFolder,
    settings: Settings,
    problem: Problem,
    optimizer: ZerothOrderOptimizer,
    reached: Reached | None,
) -> Recording:
    """Continues metrics and trajectory from the step that was ``reached``; None: from the start.

    Returns:
        The recording of the next steps.
    """
    fault = _metrics_fault(folder.metrics, evaluated=reached is not None)
    if reached is None:
        _keep_former_trajectory(folder)
        recording = Recording.begin(folder, settings, optimizer, problem.base.notes())
    else:
        recording = _resume_recording(folder, settings, problem, optimizer, reached)
    # After the lock of the trajectory was taken.
    _continue_metrics(folder, fault, 0 if reached is None else reached.step)
    folder.remove_leftovers()
    folder.write_note(settings, problem.fingerprint())
    return recording


def _resume_recording(
    folder: RunFolder,
    settings: Settings,
    problem: Problem,
    optimizer: ZerothOrderOptimizer,
    reached: Reached,
) -> Recording:
    try:
        with writing_trajectory(folder):
            begins_at = _first_step(folder, reached)
        if begins_at > 0 and settings.checkpoint == "trajectory":
            raise UserError(
                f"--checkpoint trajectory: {folder.trajectory} begins at step {begins_at}, not with the "
                "run; give --checkpoint weights"
            )
        return Recording.resume(folder, optimizer)
    except VersionError as error:  # the file is intact, and another version can continue it
        raise UserError(str(error)) from None
    except TrajectoryError as fault:
        return _begin_new_trajectory(fault, folder, settings, problem, optimizer)


def _first_step(folder: RunFolder, reached: Reached) -> int:
    """The step that the trajectory begins at.

    Raises:
        TrajectoryError: unless the trajectory is that of the checkpoint which ``reached``.
    """
    try:
        reached.check(folder.trajectory)
    except TrajectoryError:
        # A process may have begun it in place of a corrupted one, and been killed before its next checkpoint.
        if not folder.trajectory.exists() or open_recording(folder.trajectory).header.step != reached.step:
            raise
    return open_recording(folder.trajectory).header.step


def _begin_new_trajectory(
    fault: TrajectoryError,
    folder: RunFolder,
    settings: Settings,
    problem: Problem,
    optimizer: ZerothOrderOptimizer,
) -> Recording:
    """Sets the trajectory aside; records a new one from the current step if that can be replayed."""
    if settings.checkpoint == "trajectory":
        raise UserError(f"{fault}; give --checkpoint weights to continue from the weights in the checkpoint")
    kept = _set_trajectory_aside(folder)
    said = [str(fault) if kept is None else f"{fault}; it was moved to {kept}"]
    step = optimizer.param_groups[0]["step"]
    if remembers(optimizer):
        said.append(
            f"the run continues from step {step} without a trajectory, which could not contain what "
            f"{settings.optimizer} with precision {settings.precision} remembers"
        )
        recording = Recording(None, folder)
    else:
        # The new trajectory can only be replayed on this model.
        write_model(folder.base, problem.model, problem.tokenizer)
        base = dataclasses.replace(problem.base, demo=False)
        recording = Recording.begin(folder, settings, optimizer, base.notes())
        said.append(f"a new one begins at step {step}, with the model in {folder.base}")
    warn("; ".join(said))
    return recording


def _keep_former_trajectory(folder: RunFolder) -> None:
    """Sets aside the trajectory of a run without a checkpoint, unless it has no steps."""
    if folder.trajectory.is_file() and folder.trajectory.read_bytes().count(b"\n") > 1:  # header and steps
        kept = _set_trajectory_aside(folder)
        warn(
            f"{folder.checkpoints}: contains no checkpoint; the run starts again from its first step, its "
            f"trajectory was moved to {kept}"
        )


def _set_trajectory_aside(folder: RunFolder) -> Path | None:
    with writing_trajectory(folder):
        check_not_written(folder)
        return folder.set_aside("trajectory", folder.of_trajectory)


def _metrics_fault(path: Path, *, evaluated: bool) -> str | None:
    """What is wrong with the metrics of a run that was ``evaluated`` at least once; None if nothing is."""
    try:
        metrics = records.read_metrics(path)
    except UserError as error:
        return str(error).partition(";")[0]  # without its remedy, which does not apply here
    if evaluated and not any("valid_loss" in record for record in metrics):
        return f"{path}: lacks earlier records"
    return None


def _continue_metrics(folder: RunFolder, fault: str | None, step: int) -> None:
    """Drops the metrics of steps that are taken again, or sets faulty ones aside."""
    if fault is None:
        last = step if step else -1  # a run that starts again evaluates again
        metrics = records.read_metrics(folder.metrics)
        records.replace(folder.metrics, [record for record in metrics if record["step"] <= last])
        return
    with writing(folder.metrics):
        kept = folder.set_aside("metrics", [folder.metrics])
    moved = "" if kept is None else f"; it was moved to {kept}"
    warn(f"{fault}{moved}; metrics restart at step {step}")
