"""Small tasks and a tiny model for ``benchmarks/tasks.py``."""

from __future__ import annotations

import csv
from pathlib import Path

from support.tiny_models import BAD, GOOD, OTHER, tiny_language_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_KINDS = ("description", "entity", "abbreviation", "person", "location", "number")
_PROMPTS = ("Review:", "Sentiment:", "Question:", "Type:", "negative", "positive", *_KINDS)
_COLOURS = [f"w{number}" for number in range(60)]


def model(folder: Path) -> Path:
    """A random causal model that knows all words of the tasks."""
    return tiny_language_model(folder, words=[*_PROMPTS, *_COLOURS])


def data(folder: Path, train: int = 90, held_out: int = 60) -> Path:
    """Files of both tasks; each text is another one, and one held-out text of each task trains as well."""
    folder.mkdir()
    for task, labels in {"sst2": ("negative", "positive"), "trec": _KINDS}.items():
        rows = [
            (_text(task, index, labels), labels[index % len(labels)]) for index in range(train + held_out)
        ]
        _write(folder / f"{task}_train.csv", rows[:train])
        _write(folder / f"{task}_test.csv", [*rows[train:], rows[0]])
    return folder


def _text(task: str, index: int, labels: tuple[str, ...]) -> str:
    telling = (
        (GOOD if index % 2 else BAD)[index // 2 % 3] if task == "sst2" else _COLOURS[index % len(labels)]
    )
    return f"{OTHER[index % 6]} {telling} {_COLOURS[index % 59]} {_COLOURS[index // 59]}"


def _write(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
