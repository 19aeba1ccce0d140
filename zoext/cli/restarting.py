"""Goes on where a trajectory cannot: it was damaged, lost, is of another run, or has no checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from zoext import TrajectoryError, ZerothOrderOptimizer
from zoext.cli.errors import UserError, warn
from zoext.cli.problem import Problem
from zoext.cli.recording import Recording, check_not_written, writing_trajectory
from zoext.cli.result import write_model
from zoext.cli.run_folder import RunFolder
from zoext.cli.settings import Settings
from zoext.trajectory import remembers


def restart(
    damage: TrajectoryError,
    folder: RunFolder,
    settings: Settings,
    optimizer: ZerothOrderOptimizer,
    problem: Problem,
) -> Recording:
    """A trajectory that begins at the step that ``optimizer`` is at; says so, and where the old one is.

    The model of that step is kept beside it: without it, nothing could be replayed. An optimizer that
    remembers steps cannot begin one; it goes on without.

    Raises:
        UserError: for checkpoints that would be of no use without the steps before; if another run is writing
            the trajectory. Nothing was changed.
    """
    if settings.checkpoint == "trajectory":
        raise UserError(
            f"{damage}; give --checkpoint weights to go on from the weights that the checkpoint has"
        )
    kept = _set_aside(folder)
    said = [str(damage) if kept is None else f"{damage}; what there is of it was moved to {kept}"]
    step = optimizer.param_groups[0]["step"]
    if remembers(optimizer):
        said.append(
            f"the run goes on from step {step} without one: it would lack what {settings.optimizer} with "
            f"precision {settings.precision} remembers"
        )
        recording = Recording(None, folder)
    else:
        write_model(folder.base, problem)
        base = dataclasses.replace(problem.base, demo=False)
        recording = Recording.begin(folder, settings, optimizer, base)
        said.append(f"a new one begins at step {step}, with the model in {folder.base}")
    warn("; ".join(said))
    return recording


def keep_former(folder: RunFolder) -> None:
    """Moves the trajectory of a run without a checkpoint, which begins anew, to where it is kept."""
    if folder.trajectory.is_file() and folder.trajectory.read_bytes().count(b"\n") > 1:  # header and steps
        kept = _set_aside(folder)
        warn(
            f"{folder.checkpoints}: holds no checkpoint; the run begins anew, its trajectory is now in {kept}"
        )


def _set_aside(folder: RunFolder) -> Path | None:
    with writing_trajectory(folder):
        check_not_written(folder)
        return folder.set_aside("trajectory", folder.of_trajectory)
