"""The trajectory of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from zoext import Trajectory, TrajectoryError, ZerothOrderOptimizer
from zoext._engine.axes import Axes
from zoext.cli.base import Base
from zoext.cli.checkpoint import Reached
from zoext.cli.errors import UserError
from zoext.cli.position import Position
from zoext.cli.run_folder import RunFolder
from zoext.cli.settings import Settings
from zoext.trajectory import OwnedFile, open_recording


def obstacle(settings: Settings, optimizer: ZerothOrderOptimizer) -> str | None:
    """Why the trajectory of a run cannot be replayed to its bits, and what would help; None if it can."""
    if not optimizer._probe.is_exact:
        return "probes in place restore weights to rounding only; --probe streamed restores them to the bit"
    needs_frames = Axes.from_recipe(optimizer.param_groups[0]["recipe"]).direction.watches
    if needs_frames and not settings.record_frames:
        return "the bases of AGZO come from data and not from seeds; --record-frames keeps them"
    return None


def check(settings: Settings, optimizer: ZerothOrderOptimizer) -> None:
    """Raises a UserError for checkpoints that could not be replayed."""
    reason = obstacle(settings, optimizer)
    if settings.checkpoint == "trajectory" and reason is not None:
        raise UserError(f"--checkpoint trajectory: {reason}; or give --checkpoint weights")


class Recording:
    """Writes the trajectory of an optimizer below ``folder``, from now on; without one, nothing."""

    def __init__(self, trajectory: Trajectory | None, folder: RunFolder) -> None:
        self._trajectory = trajectory
        self._folder = folder

    @classmethod
    def begin(
        cls, folder: RunFolder, settings: Settings, optimizer: ZerothOrderOptimizer, base: Base
    ) -> Recording:
        """A trajectory from the first step on, in place of any that a killed process began."""
        with writing_trajectory(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ``finetune`` says it in words of its options
            check_not_written(folder)
            for path in (folder.frames, folder.trajectory):
                path.unlink(missing_ok=True)
            frames = settings.record_frames
            return cls(Trajectory(folder.trajectory, optimizer, frames=frames, notes=base.notes()), folder)

    @classmethod
    def resume(
        cls, folder: RunFolder, settings: Settings, optimizer: ZerothOrderOptimizer, reached: Reached
    ) -> Recording:
        """The trajectory that is there, from the step that a checkpoint ``reached`` and ``optimizer`` is at.

        Raises:
            TrajectoryError: if it cannot be continued. Nothing was changed.
        """
        with writing_trajectory(folder):
            begins_at = _first_step(folder, reached)
            if begins_at > 0 and settings.checkpoint == "trajectory":
                raise UserError(
                    f"--checkpoint trajectory: {folder.trajectory} begins at step {begins_at}, not with the "
                    "run; give --checkpoint weights"
                )
            return cls(Trajectory(folder.trajectory, optimizer, resume=True), folder)

    def position(self) -> Position | None:
        """Where it ends, with all steps that were taken on the disk."""
        if self._trajectory is None:
            return None
        with self.writing():
            self._trajectory.flush()
        return Position.of(self._folder.trajectory)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A write that the system refused becomes a UserError."""
        with writing_trajectory(self._folder):
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._trajectory is not None:
            with self.writing():
                self._trajectory.__exit__(kind, error, at)


def _first_step(folder: RunFolder, reached: Reached) -> int:
    """The step that the trajectory begins at.

    Raises:
        TrajectoryError: unless it is that of the checkpoint which ``reached``.
    """
    try:
        reached.check(folder.trajectory)
    except TrajectoryError:
        # Of a process that began it in place of a damaged one, and was killed before its next checkpoint.
        if not folder.trajectory.exists() or open_recording(folder.trajectory).header.step != reached.step:
            raise
    return open_recording(folder.trajectory).header.step


def check_not_written(folder: RunFolder) -> None:
    """Raises a BlockingIOError while another recording is writing the trajectory, if there is one."""
    if folder.trajectory.exists():
        OwnedFile(folder.trajectory).close()


@contextmanager
def writing_trajectory(folder: RunFolder) -> Iterator[None]:
    """What the system refuses of the trajectory inside the block becomes a UserError."""
    try:
        yield
    except BlockingIOError as error:
        raise UserError(
            f"{error.filename}: another run is writing it; wait for its end, or stop it"
        ) from None
    except OSError as error:
        path = error.filename or folder.trajectory
        reason = (error.strerror or str(error)).partition(";")[0]  # then comes a remedy in Python
        raise UserError(
            f"{path}: {reason}; put that right, then zoext finetune --out {folder.path} --resume"
        ) from None
