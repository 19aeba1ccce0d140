"""Other places that the metrics of a run go to, beside ``metrics.jsonl``: ``--log``.

A log is made only if it is asked for, and only then is its package imported.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.util
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from zoext._runtime import atomic
from zoext.cli._errors import UserError, writing
from zoext.cli._ranks import Ranks
from zoext.cli._runs import records
from zoext.cli._runs.folder import RunFolder
from zoext.cli._runs.records import Record
from zoext.cli._settings import Settings


class Log(Protocol):
    """Receives each record of the metrics once it is on the disk."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class CsvLog:
    """``metrics.csv``: all metrics so far as a table, written when a process ends."""

    package = None

    def __init__(self, folder: RunFolder, settings: Settings, step: int) -> None:
        self._folder = folder

    def write(self, record: Record) -> None:
        """Waits for the end, when all columns are known."""

    def close(self) -> None:
        metrics = records.read_metrics(self._folder.metrics)
        columns = list(dict.fromkeys(name for record in metrics for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics)
        with writing(self._folder.csv):
            atomic.write_text(self._folder.csv, text.getvalue())


class TensorBoardLog:
    """Event files in ``tensorboard/``."""

    package = "tensorboard"

    def __init__(self, folder: RunFolder, settings: Settings, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Of a run that was killed, the steps after its last checkpoint are taken again.
        self._writer: Any = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        for name, value in _scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """A run of Weights & Biases in the project that WANDB_PROJECT names, or zoext."""

    package = "wandb"

    def __init__(self, folder: RunFolder, settings: Settings, step: int) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else "zoext",
            name=folder.path.name,
            id=_identity(folder.path),
            resume="allow",
            dir=str(folder.path),
            config=dataclasses.asdict(settings),
        )

    def write(self, record: Record) -> None:
        self._run.log(dict(_scalars(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


_LOGS: dict[str, type[CsvLog | TensorBoardLog | WandbLog]] = {
    "csv": CsvLog,
    "tensorboard": TensorBoardLog,
    "wandb": WandbLog,
}

LOGS = tuple(_LOGS)


def check(names: Sequence[str]) -> None:
    """Raises a UserError for a log whose package is not installed."""
    for name in names:
        package = _LOGS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"--log {name}: needs {package}, not installed here: pip install {package}")


@contextmanager
def opened(folder: RunFolder, settings: Settings, step: int, ranks: Ranks) -> Iterator[list[Log]]:
    """The logs of ``settings``, for the steps after ``step``, on the first rank; closed after the block."""
    with ExitStack() as stack:
        logs: list[Log] = []
        for name in settings.log if ranks.is_first else ():
            log = _LOGS[name](folder, settings, step)
            stack.callback(log.close)
            logs.append(log)
        yield logs


def _scalars(record: Record) -> Iterable[tuple[str, float]]:
    return ((name, value) for name, value in record.items() if name != "step")


def _identity(path: Path) -> str:
    """The same for a run and for what resumes it."""
    note = hashlib.sha256(str(path.resolve()).encode())
    return note.hexdigest()[:16]
