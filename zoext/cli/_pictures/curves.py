"""The learning curves of several runs: their metrics, and labels that tell the runs apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoext.cli._errors import UserError, warn
from zoext.cli._problem.evaluation import Evaluation
from zoext.cli._runs.records import Record, read_metrics

#: Settings that change no curve, or only where it is evaluated.
_WITHOUT_EFFECT = {
    *("steps", "device", "parallel", "eval_every", "checkpoint", "checkpoint_every", "record_frames"),
}
_MISSING = "none"


@dataclass(frozen=True)
class Curve:
    """A run: the records of its steps and of its evaluations."""

    label: str
    steps: tuple[Record, ...]
    evaluations: tuple[Record, ...]

    def __str__(self) -> str:
        if not self.evaluations:
            return f"{self.label}: not evaluated yet"
        last = self.evaluations[-1]
        return f"{self.label}: {Evaluation.of_record(last)} after {last['forwards']} forward passes"


def read(folders: Sequence[Path]) -> list[Curve]:
    """The curves of the runs in ``folders``.

    Raises:
        UserError: for a folder without metrics or with corrupted ones, and for one that is given twice.
    """
    twice = [path for path, count in Counter(path.resolve() for path in folders).items() if count > 1]
    if twice:
        raise UserError(f"RUN {twice[0]}: is given twice; give each run once")
    metrics = [_metrics(folder) for folder in folders]
    labels = _labels(folders, [_settings(folder) for folder in folders])
    return [
        Curve(
            label,
            tuple(record for record in records if "loss" in record),
            tuple(record for record in records if "valid_loss" in record),
        )
        for label, records in zip(labels, metrics, strict=True)
    ]


def _metrics(folder: Path) -> list[Record]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"RUN {folder}: has no metrics.jsonl; give the folder of a run of zoext finetune")
    if not (records := read_metrics(path, remedy="leave out this run, or repeat it")):
        raise UserError(f"RUN {folder}: metrics.jsonl has no complete line yet; leave out this run")
    return records


def _settings(folder: Path) -> Mapping[str, Any]:
    """The settings of a run, of any version of zoext; none if they are not there or cannot be read."""
    path = folder / "run.json"
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return dict(settings)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        warn(f"{path}: corrupted; the label of this run is the name of its folder")
        return {}


def _labels(folders: Sequence[Path], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The values in which a run differs from another one; its folder where these do not tell it apart."""
    names = [name for name in _in_order(settings) if name not in _WITHOUT_EFFECT]
    differing = [name for name in names if len({_shown(known, name) for known in settings}) > 1]
    labels = [
        ", ".join(_entry(name, _shown(known, name)) for name in differing) if known else ""
        for known in settings
    ]
    counts = Counter(labels)
    places = _distinct_names(folders)
    return [
        label if label and counts[label] == 1 else ", ".join(filter(None, (place, label)))
        for label, place in zip(labels, places, strict=True)
    ]


def _in_order(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all settings, the most telling ones first."""
    names = dict.fromkeys(name for known in settings for name in known)
    first = [name for name in ("optimizer", "options", "lr", "mu") if name in names]
    return [*first, *(name for name in names if name not in first)]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name)
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items()) or _MISSING
    if isinstance(value, float):
        return f"{value:g}"
    return _MISSING if value is None or value == "" else str(value)


def _entry(name: str, value: str) -> str:
    if name == "optimizer":  # whose values need no name
        return value
    if name in {"model", "data", "valid_data"}:
        value = Path(value).name
    return f"{name.replace('_', ' ')} {value}"


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, with as many parents as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
