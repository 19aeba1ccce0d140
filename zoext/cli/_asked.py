"""Options of ``zoext evaluate`` and ``zoext predict``: a run, or a model and data."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoext.cli import _options
from zoext.cli._commands import finetune
from zoext.cli._errors import UserError
from zoext.cli._problem import asking, demo
from zoext.cli._problem.asking import Asked
from zoext.cli._runs.folder import RunFolder
from zoext.cli._settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds RUN and the options for model, data and device."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("run", metavar="RUN", type=Path, nargs="?", default=None, help="the folder of a run")
    defaults = _options.Defaults(Settings(), demo.SETTINGS)
    _options.add_task(parser, defaults)
    _options.add_machine(parser.add_argument_group("machine"), defaults)


@dataclass(frozen=True)
class Request:
    """What is asked: ``settings``, and the run that they are from, if there is one.

    ``has_data`` says whether data are given, and not those of the run.
    """

    settings: Settings
    run: Path | None
    has_data: bool

    @classmethod
    def of(cls, options: dict[str, Any]) -> Request:
        """The request of the options of a command line.

        Raises:
            UserError: for a folder without a run, or options that contradict it.
        """
        run = options.pop("run", None)
        has_data = "data" in options
        if run is None:
            if not {"model", "data"} <= options.keys() and "task" not in options:
                raise UserError("give the folder of a run, or --model and --data")
            return cls(Settings(**options), None, has_data)
        if "model" in options:
            raise UserError(
                f"--model {options['model']}: the run in {run} has its own; leave out one of them"
            )
        folder = RunFolder(run, finetune.add_arguments)
        if not folder.holds_run:
            raise UserError(f"{run}: holds no run of zoext finetune; give its --out, or --model and --data")
        stored, _ = folder.read_note()
        if stored.is_demo and has_data:
            options = {"task": demo.base(stored.dtype, stored.seed).task, **options}
        return cls(dataclasses.replace(stored, **options), run, has_data)

    def load(self, device: torch.device, *, answered: bool) -> Asked:
        """The model and the examples."""
        if self.run is None:
            return asking.load(self.settings, device, answered=answered)
        model = asking.model_of(self.run)
        if self.settings.is_demo:
            return asking.load_demo(self.settings, model, device)
        # The data may be others than the run's, and then none of them were trained on.
        settings = dataclasses.replace(self.settings, model=str(model))
        if self.has_data:
            settings = dataclasses.replace(settings, valid_data=None)
        return asking.load(settings, device, answered=answered, split=not self.has_data)
