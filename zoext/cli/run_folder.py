"""The folder of ``zoext finetune``: its settings, metrics, trajectory, checkpoints, curve and final model.

``trajectory.base`` is the model that the trajectory begins with, where that is not the one that the run began
with; ``damaged`` has trajectories and metrics that could not be continued.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoext._runtime import atomic
from zoext.cli import arguments, checkpoint, stored_settings
from zoext.cli.claim import make_unused
from zoext.cli.output_folder import OutputFolder
from zoext.cli.settings import Settings


class RunFolder(OutputFolder[Settings]):
    """Paths below ``--out``."""

    def __init__(self, path: Path) -> None:
        # In the order in which they are removed: no frames are left without their trajectory.
        results = (
            "checkpoints",
            "model",
            "metrics.jsonl",
            "curve.png",
            "damaged",
            "trajectory.base",
            "trajectory.frames.cut",
            "trajectory.jsonl.cut",
            "trajectory.frames",
            "trajectory.jsonl",
        )
        super().__init__(path, "run.json", results)
        self.checkpoints, self.model, self.metrics, self.curve, self.damaged, self.base = self._results[:6]
        self.frames, self.trajectory = self._results[-2:]

    @property
    def of_trajectory(self) -> tuple[Path, ...]:
        """The trajectory and what belongs to it, itself last."""
        return self._results[5:]

    def set_aside(self, name: str, paths: Iterable[Path]) -> Path | None:
        """Moves what there is of ``paths`` to a new folder ``damaged/NAME-N``, and returns that or None."""
        there = [path for path in paths if path.exists() or path.is_symlink()]
        if not there:
            return None
        kept = make_unused(self.damaged, name)
        for path in there:
            path.rename(kept / path.name)
        for changed in (kept, self.damaged, self.path):
            atomic.sync(changed)
        return kept

    def _parse(self, record: Any) -> Settings:
        return stored_settings.parse(record, Settings, arguments.add_arguments)

    def remove_leftovers(self) -> None:
        super().remove_leftovers()
        atomic.remove_leftovers_of(self.checkpoints, checkpoint.NAME)
