"""The best step of a run by held-out loss: which it is, and the model of that step.

A trajectory leads to every step, so nothing is stored for the best one. Where the trajectory cannot be
replayed, the weights of the best step are copied.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zoext import replay
from zoext._runtime import atomic
from zoext.cli._errors import UserError, writing
from zoext.cli._problem import demo, models
from zoext.cli._problem.problem import Problem
from zoext.cli._runs import tensors
from zoext.cli._runs.folder import RunFolder
from zoext.cli._runs.records import Record
from zoext.trajectory import TrajectoryError, open_recording

_WEIGHTS = "weights.safetensors"


def best_of(evaluations: Sequence[Record]) -> Record | None:
    """The first evaluation with the lowest held-out loss; None if no loss is finite."""
    finite = [record for record in evaluations if math.isfinite(record["valid_loss"])]
    return min(finite, key=lambda record: record["valid_loss"], default=None)


def without_improvement(evaluations: Sequence[Record]) -> int:
    """The number of evaluations after the best one; all but the first if no loss is finite."""
    best = best_of(evaluations)
    return len(evaluations) - 1 - (0 if best is None else evaluations.index(best))


class Copies:
    """Copies of the weights at some steps, below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def steps(self) -> list[int]:
        """The steps that have a copy, ascending."""
        found = [re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.glob("step-*")]
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, model: nn.Module, spared: Collection[int]) -> None:
        """Copies the weights of ``step``, then removes all copies but this and the ``spared`` ones.

        What was the best step at the last checkpoint is to be spared: the run may be resumed from there.
        """
        path = self._path(step)
        with writing(path):
            if path.exists():  # of a step that the run takes again
                shutil.rmtree(path)
            with atomic.new_folder(path) as temporary:
                tensors.write(temporary / _WEIGHTS, model)
        self.keep((step, *spared))

    def keep(self, steps: Collection[int]) -> None:
        """Removes all copies but those of ``steps``."""
        for step in self.steps:
            if step not in steps:
                shutil.rmtree(self._path(step))

    def read(self, step: int) -> dict[str, Tensor]:
        """The weights of ``step``."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(step) / _WEIGHTS
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); resume with --keep last") from None

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


@dataclass(frozen=True)
class Source:
    """Where the models of earlier steps come from.

    Args:
        base: what the run began with, as ``--model`` names it; None for the demo.
        is_replayable: whether the trajectory can be replayed bit for bit.
    """

    folder: RunFolder
    problem: Problem
    base: str | None
    is_replayable: bool

    def has(self, step: int) -> bool:
        """Whether ``model`` can make the model of ``step``, at which the run was evaluated."""
        return step in Copies(self.folder.best).steps or (
            self.is_replayable and (begin := self.trajectory_begin) is not None and step >= begin
        )

    @property
    def trajectory_begin(self) -> int | None:
        """The step that the trajectory begins at; None if there is none that can be read."""
        try:
            return open_recording(self.folder.trajectory).header.step
        except (TrajectoryError, OSError):
            return None

    def model(self, step: int) -> Any:
        """The model of ``step``, on the CPU, or in place of the trained one if it was copied."""
        copies = Copies(self.folder.best)
        if step in copies.steps:
            tensors.put(self.problem.model, copies.read(step))
            return self.problem.model
        model = self._base_model()
        try:
            replay(model, self.folder.trajectory, to_step=step)
        except ValueError as error:
            raise UserError(f"{error}; resume with --keep last for the model of the last step") from None
        return model

    def _base_model(self) -> Any:
        base = self.problem.base
        if self.trajectory_begin:  # it does not begin with the run, but with a model beside it
            return models.load(str(self.folder.base), base)[0]
        if self.base is None:
            return demo.load_model(base)[0]
        return models.load(self.base, base)[0]
