"""Answers the rows of a file with a model: labels, choices, or the texts that it generates.

RUN is the folder of a run of zoext finetune, whose model answers in the way that it was trained for. Without
RUN, --model names a model, and --template and --label-words what it is asked.

Each row is printed, or written to --out, as a JSON line with its columns and "prediction".
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from zoext._benchmarking.timing import threads
from zoext._runtime import atomic
from zoext.cli import _asked, _options
from zoext.cli._errors import UserError, reading, require, writing
from zoext.cli._failures import of_model
from zoext.cli._problem.asking import Asked
from zoext.cli._ranks import ALONE
from zoext.tasks import NotAnsweringError

EXAMPLES = """\
  zoext predict runs/reviews --data new.csv
  zoext predict runs/reviews --data new.jsonl --out answers.jsonl
  zoext predict --model ./my-causal-lm --data new.csv --label-words bad=terrible,good=great
"""

_COLUMN = "prediction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; those that are not given are absent from the namespace."""
    _asked.add_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="FILE", help="a file of JSON lines (default: print them)")
    group.add_argument("--overwrite", action="store_true", help="replace the file --out")


def run(arguments: argparse.Namespace) -> int:
    """Answers all rows, then prints or writes them."""
    require(("transformers", "safetensors"), "finetune")
    options = vars(arguments)
    out, overwrites = options.pop("out", None), options.pop("overwrite", False)
    if out is not None:
        _check_out(out, overwrites)
    with reading():
        request = _asked.Request.of(options)
        with threads(request.settings.threads):
            device = _options.choose_device(request.settings.device, ALONE)
            asked = request.load(device, answered=False)
            if _COLUMN in asked.table.columns:
                raise UserError(
                    f"{asked.table.source}: has a column {_COLUMN!r}, which would be lost; rename it"
                )
            lines = list(_lines(asked, request.settings.at_once, device))
    text = "".join(f"{line}\n" for line in lines)
    if out is None:
        print(text, end="")
    else:
        with writing(out):
            atomic.write_text(out, text)
    return 0


def _check_out(out: Path, overwrites: bool) -> None:
    """Raises a UserError for a file that cannot be written, before the model is asked."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give a file")
    if out.exists() and not overwrites:
        raise UserError(f"--out {out}: exists; give --overwrite or another file")
    if not os.access(out.parent, os.W_OK):
        reason = "cannot be written to" if out.parent.is_dir() else "is no folder"
        raise UserError(f"--out {out}: {out.parent} {reason}; make it so or give another file")


def _lines(asked: Asked, batch_size: int, device: torch.device) -> Iterator[str]:
    for start in range(0, len(asked.examples), batch_size):
        some = asked.examples[start : start + batch_size]
        try:
            with of_model(f"rows {start + 1} to {start + len(some)}"):
                answers: Sequence[int | str] = asked.objective.answers(asked.model, some, device)
        except NotAnsweringError as error:
            raise UserError(f"{asked.title}: {error}: zoext evaluate") from None
        for row, answer in zip(asked.table.rows[start:], answers, strict=False):
            yield json.dumps({**row, _COLUMN: _named(asked, row, answer)}, ensure_ascii=False, default=str)


def _named(asked: Asked, row: Any, answer: int | str) -> Any:
    """The answer as the data call it."""
    if isinstance(answer, str):
        return answer
    return asked.names[answer] if asked.names else row["choices"][answer]
