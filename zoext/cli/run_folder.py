"""The folder of ``zoext finetune``: its settings, metrics, checkpoints, curve and final model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoext import atomic
from zoext.cli import arguments, stored_settings
from zoext.cli.output_folder import OutputFolder
from zoext.cli.settings import Settings


class RunFolder(OutputFolder[Settings]):
    """Paths below ``--out``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "run.json", ("checkpoints", "model", "metrics.jsonl", "curve.png"))
        self.checkpoints, self.model, self.metrics, self.curve = self._results

    def _parse(self, record: Any) -> Settings:
        return stored_settings.parse(record, Settings, arguments.add_arguments)

    def remove_leftovers(self) -> None:
        super().remove_leftovers()
        atomic.remove_leftovers(self.checkpoints / "step-*")
