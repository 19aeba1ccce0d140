"""Reads examples, texts with or without labels, from a file, a folder or the Hugging Face hub."""

from __future__ import annotations

import csv
import hashlib
import importlib
import importlib.util
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoext.cli._errors import UserError, first_line
from zoext.cli._problem.hub import cannot_load

SUFFIXES = (".csv", ".jsonl", ".txt")
TRAIN_NAMES = ("train",)
VALID_NAMES = ("valid", "validation", "dev")

Label = int | str


@dataclass(frozen=True)
class Table:
    """Texts and their labels, which are None if there are none."""

    source: str
    texts: tuple[str, ...]
    labels: tuple[Label, ...] | None

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, wanted: Iterable[int]) -> Table:
        """The rows at these indices."""
        wanted = list(wanted)
        labels = None if self.labels is None else tuple(self.labels[i] for i in wanted)
        return Table(self.source, tuple(self.texts[i] for i in wanted), labels)


def read(source: str) -> tuple[Table, Table | None]:
    """The training examples of ``source``, and its validation examples or None."""
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return read_file(path), None
    if path.suffix in SUFFIXES:
        raise UserError(f"--data {source}: no such file")
    return _read_hub(source)


def read_file(path: Path) -> Table:
    """The examples of a .csv, .jsonl or .txt file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # each format splits lines itself
            text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from None
    match path.suffix:
        case ".txt":
            lines = (line.strip() for line in _lines(text))
            return table(str(path), [{"text": line} for line in lines if line])
        case ".csv":
            return table(str(path), _csv_rows(path, text), labels_are_text=True)
        case ".jsonl":
            return table(str(path), _jsonl_rows(path, text))
    raise UserError(f"{path}: unknown file type; give one of {', '.join(SUFFIXES)}")


def _lines(text: str) -> list[str]:
    """Splits at \\n and \\r\\n only; str.splitlines also splits at U+2028 and others."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _csv_rows(path: Path, text: str) -> Sequence[Mapping[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}") from None
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UserError(
                f"{path}: row {number} has more fields than the header; quote texts that contain commas"
            )
    return rows


def _jsonl_rows(path: Path, text: str) -> Sequence[Mapping[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON: {first_line(error)}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not an object such as {{'text': ..., 'label': ...}}")
        rows.append(row)
    return rows


def table(source: str, rows: Sequence[Mapping[str, Any]], labels_are_text: bool = False) -> Table:
    """Checks that every row has a text, and that either all rows or none have a label."""
    if not rows:
        raise UserError(f"{source}: contains no examples")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if "text" not in columns:
        raise UserError(f"{source}: no column 'text'; it has {', '.join(columns)}: rename one of them")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise UserError(
                f"{source}: row {number}: text is {row.get('text')!r}, not a text; correct or remove the row"
            )
    texts = tuple(row["text"] for row in rows)
    if "label" not in columns:
        return Table(source, texts, None)
    for number, row in enumerate(rows, 1):
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, Label) or label == "":
            raise UserError(
                f"{source}: row {number}: label is {label!r}; a label is a class, an integer or a text"
            )
    labels: tuple[Label, ...] = tuple(row["label"] for row in rows)
    distinct = set(labels)
    both = sorted(str(label) for label in distinct if isinstance(label, int) and str(label) in distinct)
    if both:
        raise UserError(
            f"{source}: label {both[0]} is a number in some rows and a text in others; use one form"
        )
    return Table(source, texts, _integers(labels) if labels_are_text else labels)


def _integers(labels: tuple[Label, ...]) -> tuple[Label, ...]:
    """Converts labels to integers if all are written canonically: "01" and "1" stay two classes."""
    try:
        integers = tuple(int(label) for label in labels)
    except ValueError:
        return labels
    return integers if tuple(map(str, integers)) == labels else labels


def _read_folder(folder: Path) -> tuple[Table, Table | None]:
    train, valid = _split_file(folder, TRAIN_NAMES), _split_file(folder, VALID_NAMES)
    if train is None:
        kinds = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise UserError(f"{folder}: contains none of {kinds}")
    return read_file(train), None if valid is None else read_file(valid)


def _split_file(folder: Path, names: Sequence[str]) -> Path | None:
    found = [
        folder / (name + suffix)
        for name in names
        for suffix in SUFFIXES
        if (folder / (name + suffix)).is_file()
    ]
    if len(found) > 1:
        raise UserError(
            f"{folder}: {', '.join(path.name for path in found)} are files of the same split; keep one"
        )
    return found[0] if found else None


def _read_hub(name: str) -> tuple[Table, Table | None]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"--data {name}: neither a file nor a folder; "
            "to load it from the Hugging Face hub: pip install datasets"
        )
    datasets: Any = importlib.import_module("datasets")
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # raised by a script, the network or a parser
        raise cannot_load("data set", "--data", name, error) from error
    tables = {part: table(f"{name}[{part}]", list(rows)) for part, rows in splits.items()}
    train = next((tables[part] for part in TRAIN_NAMES if part in tables), None)
    if train is None:
        raise UserError(f"--data {name}: has no split 'train', only {', '.join(tables)}")
    return train, next((tables[part] for part in VALID_NAMES if part in tables), None)


def hold_out(examples: Table, fraction: float, seed: int) -> tuple[Table, Table]:
    """Holds out ``fraction`` of the distinct texts; examples with the same text stay together.

    At least one text of each label remains for training, so fewer texts may be held out.
    """
    # Sorting by a hash gives the same split on every platform and version.
    order = sorted(set(examples.texts), key=lambda text: _digest(seed, text))
    if len(order) < 2:
        raise UserError(f"{examples.source}: too few distinct texts to hold some out; give --valid-data")
    held = _held_out(examples, order, min(max(1, round(fraction * len(order))), len(order) - 1))
    if not held:
        raise UserError(
            f"{examples.source}: no text can be held out without leaving a label with no training example; "
            "add examples or give --valid-data"
        )
    parts: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(examples.texts):
        parts[text in held].append(i)
    return examples.rows(parts[0]), examples.rows(parts[1])


def _held_out(examples: Table, order: Sequence[str], count: int) -> set[str]:
    """The first ``count`` texts in ``order`` that are not the only remaining text of one of their labels."""
    if examples.labels is None:
        return set(order[:count])
    labels: dict[str, set[Label]] = {text: set() for text in order}
    for text, label in zip(examples.texts, examples.labels, strict=True):
        labels[text].add(label)
    in_training = Counter(label for theirs in labels.values() for label in theirs)
    held: set[str] = set()
    for text in order:
        if len(held) < count and all(in_training[label] > 1 for label in labels[text]):
            held.add(text)
            in_training.subtract(labels[text])
    return held


def _digest(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
