"""The folder of ``zoext compare``: its settings, the raw records, the table and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoext.cli import stored_settings
from zoext.cli.comparison.arguments import add_arguments
from zoext.cli.comparison.settings import ComparisonSettings
from zoext.cli.output_folder import OutputFolder


class ComparisonFolder(OutputFolder[ComparisonSettings]):
    """Paths below ``--out``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "comparison.json", ("runs.jsonl", "table.md", "curves.png"))
        self.runs, self.table, self.curves = self._results

    def _parse(self, record: Any) -> ComparisonSettings:
        return stored_settings.parse(record, ComparisonSettings, add_arguments)
