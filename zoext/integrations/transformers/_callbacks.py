"""A callback of ``Trainer`` that records the trajectory of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoext.optimizer import unwrap
from zoext.trajectory import Trajectory


class TrajectoryCallback(TrainerCallback):
    """Records the steps of a ``ZOTrainer`` in a ``zoext.Trajectory``, for ``zoext.replay``.

        trainer = ZOTrainer(model, args, train_dataset=dataset, callbacks=[TrajectoryCallback("run.jsonl")])

    The first process writes the file. ``train(resume_from_checkpoint=...)`` continues it from the step of the
    checkpoint. With ``load_best_model_at_end``, the recording ends with the last step, and
    ``replay(model, path, to_step=best)`` gives the best model.

    Args:
        path: the file to write. It must not exist when training begins at step 0.
        frames: also record the bases of AGZO; see ``Trajectory``.
        notes: plain JSON data to keep in the header of the file.

    Raises:
        FileExistsError: when training begins at step 0, if ``path`` exists.
        ValueError, TrajectoryError: as ``Trajectory``.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, frames: bool = False, notes: Mapping[str, Any] | None = None
    ) -> None:
        self.path = Path(path)
        self.trajectory: Trajectory | None = None
        self._frames = frames
        self._notes = notes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # With auto_find_batch_size, training begins again after a batch that was too large.
        if self.trajectory is not None:
            return
        optimizer = unwrap(kwargs["optimizer"])
        is_continued = optimizer.param_groups[0]["step"] > 0
        try:
            self.trajectory = Trajectory(
                self.path,
                optimizer,
                frames=self._frames,
                notes=self._notes,
                resume=is_continued and _is_on_first_process(self.path, args),
            )
        except FileExistsError:
            raise FileExistsError(
                f"path: {self.path} exists; give another path, or continue the run that it records with "
                "train(resume_from_checkpoint=True)"
            ) from None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the recording. ``ZOTrainer`` calls it at the end of ``train``, also if that raises."""
        if self.trajectory is not None:
            self.trajectory.close()
            self.trajectory = None


def _is_on_first_process(path: Path, args: TrainingArguments) -> bool:
    """Whether the file exists there; processes on other machines may not have it."""
    exists = torch.tensor(int(path.exists()), device=args.device)
    if args.world_size > 1:
        torch.distributed.broadcast(exists, 0)
    return bool(exists)
