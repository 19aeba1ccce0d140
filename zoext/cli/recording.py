"""The trajectory of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from zoext import Trajectory, TrajectoryError, ZerothOrderOptimizer
from zoext.axes import Axes
from zoext.cli.base import Base
from zoext.cli.errors import UserError
from zoext.cli.position import Position
from zoext.cli.run_folder import RunFolder
from zoext.cli.settings import Settings


def needs_frames(optimizer: ZerothOrderOptimizer) -> bool:
    """Whether its directions come from data, so that seeds are not enough to replay what it does."""
    return Axes.from_recipe(optimizer.param_groups[0]["recipe"]).direction.watches


def check(settings: Settings, optimizer: ZerothOrderOptimizer) -> None:
    """Raises a UserError for checkpoints that could not be replayed."""
    if settings.checkpoint == "trajectory" and needs_frames(optimizer) and not settings.record_frames:
        raise UserError(
            f"--checkpoint trajectory: what {settings.optimizer} does cannot be replayed without the bases "
            "that it takes from data; give --record-frames, or --checkpoint weights"
        )


class Recording:
    """Writes the trajectory of ``optimizer`` below ``folder``, from now on."""

    def __init__(self, trajectory: Trajectory, folder: RunFolder) -> None:
        self._trajectory = trajectory
        self._folder = folder

    @classmethod
    def begin(
        cls, folder: RunFolder, settings: Settings, optimizer: ZerothOrderOptimizer, base: Base
    ) -> Recording:
        """A trajectory from the first step on, in place of any that a killed process began."""
        with _writing(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ``finetune`` says it in words of its options
            for path in (folder.frames, folder.trajectory):
                path.unlink(missing_ok=True)
            frames = settings.record_frames
            return cls(Trajectory(folder.trajectory, optimizer, frames=frames, notes=base.notes()), folder)

    @classmethod
    def resume(cls, folder: RunFolder, optimizer: ZerothOrderOptimizer) -> Recording:
        """The trajectory that is there, from the step that ``optimizer`` is at."""
        with _writing(folder):
            try:
                return cls(Trajectory(folder.trajectory, optimizer, resume=True), folder)
            except TrajectoryError as error:
                raise UserError(f"{error}; or start again with --overwrite") from None

    def position(self) -> Position:
        """Where it ends, with all steps that were taken on the disk."""
        with self.writing():
            self._trajectory.flush()
        return Position.of(self._folder.trajectory)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A write that the system refused becomes a UserError."""
        with _writing(self._folder):
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        with self.writing():
            self._trajectory.__exit__(kind, error, at)


@contextmanager
def _writing(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path = error.filename or folder.trajectory
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(
            f"{path}: {reason}; nothing else is harmed: put that right, then zoext finetune "
            f"--out {folder.path} --resume"
        ) from None
