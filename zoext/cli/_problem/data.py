"""Reads tables, rows of named columns, from a file, a folder or the Hugging Face hub."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoext.cli._errors import UserError, first_line
from zoext.cli._problem.hub import cannot_load

#: What zoext reads itself, and what the package datasets reads.
OWN_SUFFIXES = (".csv", ".jsonl", ".txt")
OTHER_SUFFIXES = (".parquet", ".json", ".tsv", ".arrow")
SUFFIXES = (*OWN_SUFFIXES, *OTHER_SUFFIXES)
TRAIN_NAMES = ("train",)
VALID_NAMES = ("valid", "validation", "dev")

LABEL = "label"

#: The columns that tell what a table is for.
_USUAL = ("text", LABEL, "prompt", "completion", "messages", "question", "choices", "answer", "answers")
#: JSON writes letters such as emoji as pairs of escapes; programs that cut texts leave halves of them.
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")

Label = int | str
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of the same columns, and where they are from, for messages.

    ``is_text`` says that all values are texts, as in a CSV file.
    """

    source: str
    rows: tuple[Row, ...]
    is_text: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns, in the order in which they occur."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))

    def take(self, wanted: Iterable[int]) -> Table:
        """The rows at these indices."""
        return dataclasses.replace(self, rows=tuple(self.rows[i] for i in wanted))

    def renamed(self, names: Mapping[str, str]) -> Table:
        """With other names for some columns.

        Raises:
            UserError: for a column that the table lacks, or a new name that it has.
        """
        for old, new in names.items():
            if old not in self.columns:
                raise UserError(f"{self.source}: no column {old!r}; it has {', '.join(self.columns)}")
            if new in self.columns and new not in names:
                raise UserError(
                    f"{self.source}: {old!r} cannot be read as {new!r}, a column that it has as well; "
                    "remove that column"
                )
        rows = tuple({names.get(name, name): value for name, value in row.items()} for row in self.rows)
        return dataclasses.replace(self, rows=rows)

    def arranged(self, arrange: Callable[[Row], Row]) -> Table:
        """With rows made by ``arrange`` of these."""
        return dataclasses.replace(self, rows=tuple(arrange(row) for row in self.rows))


def read(
    source: str, configuration: str | None = None, with_names: bool = True, option: str = "--data"
) -> tuple[Table, Table | None]:
    """The training rows of ``source``, which ``option`` names, and its validation rows or None.

    On the hub, ``configuration`` selects one of several data sets of one name; "NAME:CONFIGURATION" does too.
    Where a data set stores numbers of classes and their names, the latter are read, or ``with_names`` is
    false.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, with_names)
    if path.is_file():
        return read_file(path), None
    if path.suffix.lower() in SUFFIXES:
        raise UserError(f"{option} {source}: no such file")
    if path.exists() or source.startswith((".", "/", "~")):
        error = OSError("neither a file nor a folder") if path.exists() else FileNotFoundError(source)
        raise cannot_load("data set", option, source, error)
    name, _, named = source.partition(":")
    return _read_hub(name, configuration or named or None, with_names, option)


def read_file(path: Path) -> Table:
    """The rows of a file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix in OTHER_SUFFIXES:
        return _of_datasets(path, suffix)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # each format splits lines itself
            text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from None
    match suffix:
        case ".txt":
            lines = (line.strip() for line in _lines(text))
            return table(str(path), [{"text": line} for line in lines if line])
        case ".csv":
            return table(str(path), _csv_rows(path, text), is_text=True)
        case ".jsonl":
            return table(str(path), _jsonl_rows(path, text))
    raise UserError(f"{path}: unknown file type; give one of {', '.join(SUFFIXES)}")


def _lines(text: str) -> Iterator[str]:
    """Splits at \\n and \\r\\n only; str.splitlines also splits at U+2028 and others."""
    return (line.removesuffix("\r") for line in text.split("\n"))


def _csv_rows(path: Path, text: str) -> Sequence[Row]:
    csv.field_size_limit(2**31 - 1)  # texts may be long; the default of 131,072 letters refuses them
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    names: list[str] = []
    read = 0  # lines of the rows so far
    try:
        for fields in reader:
            read = reader.line_num
            if not fields:
                continue
            if names:
                rows.append(_csv_row(f"{path}: line {read}: row {len(rows) + 1}", names, fields))
            else:
                names = _header(path, fields)
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise UserError(
                f"{path}: line {read + 1}: a quotation mark in this row is not closed; close it, and write "
                'those within a quoted text twice, as ""'
            ) from None
        raise UserError(f"{path}: line {reader.line_num}: {error}") from None
    return rows


def _header(path: Path, names: list[str]) -> list[str]:
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: the header names {twice!r} twice; rename or remove one of these columns")
    spaced = next((name for name in names if name != name.strip() and name.strip() in _USUAL), None)
    if spaced is not None:
        raise UserError(
            f"{path}: the header names {spaced!r}, with a space; write no spaces next to the commas"
        )
    return names


def _csv_row(where: str, names: list[str], fields: list[str]) -> Row:
    if len(fields) > len(names):
        raise UserError(f"{where} has more fields than the header; quote texts that contain commas")
    if len(fields) < len(names):
        raise UserError(
            f"{where} has no {names[len(fields)]!r}: it has fewer fields than the header; complete it"
        )
    return dict(zip(names, fields, strict=True))


def _jsonl_rows(path: Path, text: str) -> Sequence[Row]:
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON: {first_line(error)}") from None
        if _HALF_A_PAIR.search(line) and _has_half_a_pair(row):
            raise UserError(
                f"{path}: line {number} has half of a pair of UTF-16 escapes, such as \\ud83d, which is no "
                "letter; write both halves or remove it"
            )
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not an object such as {{'text': ..., 'label': ...}}")
        rows.append(row)
    return rows


def _has_half_a_pair(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def table(source: str, rows: Sequence[Row], is_text: bool = False) -> Table:
    """A table of at least one row."""
    if not rows:
        raise UserError(f"{source}: contains no examples")
    return Table(source, tuple(rows), is_text)


def with_labels(table: Table, column: str = LABEL) -> Table:
    """Checks that each row has a label, a class, in ``column``; texts that are integers become these.

    Raises:
        UserError: for a label that is missing or no class.
    """
    source = table.source
    for number, row in enumerate(table.rows, 1):
        label = row.get(column)
        if isinstance(label, bool) or not isinstance(label, Label) or label == "":
            raise UserError(
                f"{source}: row {number}: {column} is {label!r}; a label is a class, an integer or a text: "
                'name the classes, as in "yes" and "no"'
            )
    labels: tuple[Label, ...] = tuple(row[column] for row in table.rows)
    distinct = set(labels)
    both = sorted(str(label) for label in distinct if isinstance(label, int) and str(label) in distinct)
    if both:
        raise UserError(
            f"{source}: {column} {both[0]} is a number in some rows and a text in others; use one form"
        )
    fraction = next((number for number, label in enumerate(labels, 1) if _is_fraction(label)), None)
    if fraction is not None and all(_is_number(label) for label in distinct):
        raise UserError(
            f"{source}: row {fraction}: {column} is {labels[fraction - 1]!r}; a label is a class, not a "
            "quantity: round the labels to classes, or name these"
        )
    if not table.is_text:
        return table
    integers = _integers(labels)
    rows = tuple({**row, column: label} for row, label in zip(table.rows, integers, strict=True))
    return dataclasses.replace(table, rows=rows)


def _is_number(label: Label) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _is_fraction(label: Label) -> bool:
    return _is_number(label) and not float(label).is_integer()


def _integers(labels: tuple[Label, ...]) -> tuple[Label, ...]:
    """Converts labels to integers if all are written canonically: "01" and "1" stay two classes."""
    try:
        integers = tuple(int(label) for label in labels)
    except ValueError:
        return labels
    return integers if tuple(map(str, integers)) == labels else labels


def _read_folder(folder: Path, with_names: bool) -> tuple[Table, Table | None]:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _of_splits(str(folder), _datasets(str(folder)).load_from_disk(str(folder)), with_names)
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


def _datasets(wanted: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"--data {wanted}: needs the package datasets to be read: pip install datasets")
    return importlib.import_module("datasets")


@contextmanager
def _without_logs() -> Iterator[None]:
    """Silences the bars of datasets, and what it and its client of the hub log: exceptions say it."""
    datasets = importlib.import_module("datasets")
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def _of_datasets(path: Path, suffix: str) -> Table:
    kind = {".tsv": "csv"}.get(suffix, suffix.removeprefix("."))
    options = {"sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False} if suffix == ".tsv" else {}
    datasets = _datasets(str(path))
    try:
        with _without_logs():
            loaded = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except Exception as error:  # of any parser
        cause = error.__cause__ or error
        raise UserError(f"{path}: cannot be read: {first_line(cause)}") from None
    return _of_dataset(str(path), loaded, with_names=True)


def _read_hub(
    name: str, configuration: str | None, with_names: bool, option: str
) -> tuple[Table, Table | None]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{option} {name}: neither a file nor a folder; "
            "to load it from the Hugging Face hub: pip install datasets"
        )
    datasets = _datasets(name)
    try:
        with _without_logs():
            splits = datasets.load_dataset(name, configuration)
    except Exception as error:  # raised by a script, the network or a parser
        raise cannot_load("data set", option, name, error) from error
    return _of_splits(name, splits, with_names)


def _of_splits(name: str, splits: Any, with_names: bool) -> tuple[Table, Table | None]:
    if not isinstance(splits, dict):  # a single data set that was saved
        return _of_dataset(name, splits, with_names), None
    parts = {part: splits[part] for part in (*TRAIN_NAMES, *VALID_NAMES) if part in splits}
    tables = {part: _of_dataset(f"{name}[{part}]", rows, with_names) for part, rows in parts.items()}
    train = next((tables[part] for part in TRAIN_NAMES if part in tables), None)
    if train is None:
        raise UserError(f"--data {name}: has no split 'train', only {', '.join(splits)}")
    return train, next((tables[part] for part in VALID_NAMES if part in tables), None)


def _of_dataset(source: str, dataset: Any, with_names: bool) -> Table:
    found = table(source, list(dataset))
    names = getattr(dataset.features.get(LABEL), "names", None) if with_names else None
    if not names:
        return found
    return found.arranged(lambda row: {**row, LABEL: names[row[LABEL]] if row[LABEL] >= 0 else row[LABEL]})
