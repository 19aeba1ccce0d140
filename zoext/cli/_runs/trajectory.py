"""Records the trajectory of a run, and says whether it can be replayed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from zoext import Trajectory, ZerothOrderOptimizer
from zoext.cli._errors import UserError
from zoext.cli._runs.checkpoint import Position
from zoext.cli._runs.folder import RunFolder
from zoext.cli._settings import Settings
from zoext.trajectory import OwnedFile


def obstacle(settings: Settings, optimizer: ZerothOrderOptimizer) -> str | None:
    """Why a trajectory cannot be replayed bit for bit, and the remedy; None if it can."""
    if not optimizer.engine.probe.is_exact:
        return "in-place probes restore weights only to rounding; --probe streamed restores them bit for bit"
    if optimizer.engine.axes.direction.watches and not settings.record_frames:
        return "the bases of AGZO depend on data, not only on seeds; --record-frames records them"
    return None


def check_replayable(settings: Settings, optimizer: ZerothOrderOptimizer) -> None:
    """Raises a UserError for checkpoints that could not be restored by replay."""
    reason = obstacle(settings, optimizer)
    if settings.checkpoint == "trajectory" and reason is not None:
        raise UserError(f"--checkpoint trajectory: {reason}; or give --checkpoint weights")


class Recording:
    """Records an optimizer into the trajectory of ``folder``; without a ``trajectory``, nothing."""

    def __init__(self, trajectory: Trajectory | None, folder: RunFolder) -> None:
        self._trajectory = trajectory
        self._folder = folder

    @classmethod
    def begin(
        cls, folder: RunFolder, settings: Settings, optimizer: ZerothOrderOptimizer, notes: dict[str, Any]
    ) -> Recording:
        """A new trajectory; replaces one that a killed process began, and its frames."""
        with writing_trajectory(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ``finetune`` reports obstacles in terms of its own options
            check_not_written(folder)
            for file in (folder.frames, folder.trajectory):
                file.unlink(missing_ok=True)
            frames = settings.record_frames
            trajectory = Trajectory(
                folder.trajectory, optimizer, frames=frames, notes=notes, collective=False
            )
            return cls(trajectory, folder)

    @classmethod
    def resume(cls, folder: RunFolder, optimizer: ZerothOrderOptimizer) -> Recording:
        """Continues the trajectory from the step that ``optimizer`` is at.

        Raises:
            TrajectoryError: if it cannot be continued. Nothing was changed.
        """
        with writing_trajectory(folder):
            return cls(Trajectory(folder.trajectory, optimizer, resume=True, collective=False), folder)

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded."""
        return self._trajectory is not None

    def position(self) -> Position | None:
        """The end of the trajectory, after all steps so far are on the disk."""
        if self._trajectory is None:
            return None
        with self.writing():
            self._trajectory.flush()
        return Position.of(self._folder.trajectory)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns an OSError of the trajectory into a UserError."""
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


def check_not_written(folder: RunFolder) -> None:
    """Raises a BlockingIOError while another recording writes the trajectory."""
    if folder.trajectory.exists():
        OwnedFile(folder.trajectory).close()


@contextmanager
def writing_trajectory(folder: RunFolder) -> Iterator[None]:
    """Turns an OSError of the trajectory into a UserError."""
    try:
        yield
    except BlockingIOError as error:
        raise UserError(
            f"{error.filename}: another run is writing it; wait until it ends, or stop it"
        ) from None
    except OSError as error:
        file, out = error.filename or folder.trajectory, folder.path
        reason = (error.strerror or str(error)).partition(";")[0]  # what follows is a remedy in Python
        raise UserError(f"{file}: {reason}; fix this, then zoext finetune --out {out} --resume") from None
