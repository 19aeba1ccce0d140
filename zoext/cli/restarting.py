"""Goes on from the weights of a checkpoint whose trajectory was damaged, lost, or is that of another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from zoext import TrajectoryError, ZerothOrderOptimizer, atomic
from zoext.cli.claim import make_unused
from zoext.cli.errors import UserError, warn
from zoext.cli.problem import Problem
from zoext.cli.recording import Recording, check_not_written, writing_trajectory
from zoext.cli.result import write_model
from zoext.cli.run_folder import RunFolder
from zoext.cli.settings import Settings
from zoext.trajectory.matching import remembers


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


def _set_aside(folder: RunFolder) -> Path | None:
    """Moves what there is of the trajectory to a new folder, which it returns; None if there is nothing."""
    there = [path for path in folder.of_trajectory if path.exists() or path.is_symlink()]
    if not there:
        return None
    with writing_trajectory(folder):
        check_not_written(folder)
        kept = make_unused(folder.damaged, "trajectory")
        for path in there:
            path.rename(kept / path.name)
        for changed in (kept, folder.damaged, folder.path):
            atomic.sync(changed)
    return kept
