"""Runs ``zoext compare`` on a tiny model in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import zoext
from support.finetune_command import Command
from support.tiny_models import labelled, tiny_bert
from zoext.cli._problem.optimizers import OPTIMIZERS, Method


@dataclass
class CompareCommand(Command):
    """A short comparison that would succeed, and its files."""

    def arguments(self, *more: str) -> list[str]:
        defaults = {
            "--model": str(self.folder / "model"),
            "--data": str(self.folder / "words.jsonl"),
            "--validation-fraction": "0.4",
            "--optimizers": "mezo",
            "--forwards": "12",
            "--eval-every": "5",
            "--seeds": "2",
            "--lr": "0.003",
            "--mu": "0.002",
            "--batch-size": "3",
            "--device": "cpu",
            "--out": str(self.out),
        }
        if "--resume" in more:
            defaults = {"--out": str(self.out)}
        replaced = {option.partition("=")[0] for option in more}
        given = [f"{name}={value}" for name, value in defaults.items() if name not in replaced]
        return ["compare", *given, "--quiet", *more]

    @property
    def raw(self) -> list[dict[str, Any]]:
        lines = (self.out / "runs.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.raw if record["record"] == kind]

    def tables(self) -> list[list[dict[str, str]]]:
        """The two tables of the page, each as rows by the names of its columns."""
        tables: list[list[list[str]]] = [[]]
        for line in (self.out / "table.md").read_text(encoding="utf-8").splitlines():
            if line.startswith("|"):
                tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
            elif tables[-1]:
                tables.append([])
        return [[dict(zip(table[0], row, strict=True)) for row in table[2:]] for table in tables if table]


#: Methods of 3 and 4 forward passes per step, compared with 2 of MeZO, one of them with another lr scale.
RIVALS = {
    "one-sided": Method(
        partial(zoext.ZerothOrderOptimizer, estimator=zoext.ForwardDifference(samples=2)),
        "forward differences",
        3,
        lr_scale=0.5,
    ),
    "signs": Method(
        partial(
            zoext.ZerothOrderOptimizer,
            direction=zoext.Rademacher(),
            estimator=zoext.CentralDifference(samples=2),
        ),
        "random signs",
        4,
    ),
}
ALL = ("mezo", *RIVALS)


def register_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes MeZO and the rivals the only optimizers."""
    # From the last to the second: they are put back in the opposite order, which is theirs.
    for name in list(OPTIMIZERS)[:0:-1]:
        assert name != "mezo"
        monkeypatch.delitem(OPTIMIZERS, name)
    for name, method in RIVALS.items():
        monkeypatch.setitem(OPTIMIZERS, name, method)


def prepare(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CompareCommand:
    """A model and data in ``folder``, and the command that compares MeZO and the rivals on them."""
    register_rivals(monkeypatch)
    tiny_bert(folder / "model")
    labelled(folder / "words.jsonl")
    return CompareCommand(folder, capsys)
