"""The slice of a model that the user names: its settings, its weights and its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoext import StreamedProbeError, TrajectoryError, replay
from zoext.cli._bars import bar
from zoext.cli._commands import finetune
from zoext.cli._errors import UserError
from zoext.cli._pictures import slices
from zoext.cli._pictures.slices import Plan, Slice
from zoext.cli._problem import demo, load, steps
from zoext.cli._problem.problem import Problem
from zoext.cli._runs.folder import RunFolder
from zoext.cli._settings import Settings
from zoext.tasks import Batch

#: The options that a run has answered.
_OF_THE_RUN = ("model", "task", "dtype")


def settings_of(given: dict[str, Any], run: Path | None) -> Settings:
    """The settings that are ``given``; the others are those of ``run``, or the defaults."""
    if run is None:
        is_demo = not {"model", "data", "task"} & given.keys()
        return dataclasses.replace(demo.SETTINGS if is_demo else Settings(), **given)
    for name in _OF_THE_RUN:
        if name in given:
            raise UserError(f"--{name} {given[name]}: --run {run} has its own; leave out one of them")
    folder = RunFolder(run, finetune.add_arguments)
    if not folder.holds_run:
        raise UserError(f"--run {run}: holds no run of zoext finetune; give its --out, or --model and --data")
    try:
        settings, _ = folder.read_note()
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"--run {run}: {reason}; give --model and --data instead") from None
    return dataclasses.replace(settings, **given)


def load_at(settings: Settings, run: Path | None, to_step: int | None, device: torch.device) -> Problem:
    """The problem, with the weights of ``run`` after ``to_step``, by default its last recorded step."""
    problem = load(settings, device)
    if run is None:
        return problem
    path = run / "trajectory.jsonl"
    if not path.is_file():
        raise UserError(f"--run {run}: has no trajectory.jsonl to replay; give --model {run / 'model'}")
    try:
        replay(problem.model, path, to_step=to_step)
    except TrajectoryError as error:
        raise UserError(
            f"--run {run}: cannot be replayed: {error}; give --model {run / 'model'} and --data instead"
        ) from None
    except ValueError as error:  # about to_step, whose name it begins with
        raise UserError(f"--to-step{str(error).removeprefix('to_step')}") from None
    return problem


def measure(
    problem: Problem,
    settings: Settings,
    plan: Plan,
    batches: int,
    device: torch.device,
    quiet: bool,
) -> Slice:
    """The slice on the first ``batches`` batches of a run with these settings."""
    wanted, there = batches * settings.batch_size, len(problem.train)
    if wanted > there:
        raise UserError(
            f"--batches {batches}: batches of {settings.batch_size} take {wanted} training examples, and "
            f"there are {there}; give fewer --batches or a smaller --batch-size"
        )
    # A slice evaluates one point after the other, so there is nothing to batch.
    probe = "streamed" if settings.probe == "batched" else settings.probe
    evaluated = [_loss(problem, steps.batches(problem, settings, step, device)) for step in range(batches)]
    try:
        with closing(bar("point", plan.evaluations, 0, quiet)) as shown:
            return slices.measure(problem.model, evaluated, plan, probe, shown.update)
    except StreamedProbeError as error:
        raise UserError(f"{str(error).partition('. ')[0]}; give --probe inplace") from None


def _loss(problem: Problem, pieces: Sequence[Batch]) -> Callable[[], Tensor]:
    return lambda: steps.scores_of(problem, pieces).mean_loss()
