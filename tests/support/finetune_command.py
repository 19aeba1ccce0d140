"""Runs ``zoext finetune`` on a tiny model in this process."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.tiny_models import labelled, tiny_bert
from zoext.cli import main


@dataclass
class Command:
    """A run that would succeed, and its files."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def works(self, *more: str) -> None:
        assert main(self.arguments(*more)) == 0
        self.capsys.readouterr()

    def is_refused(self, *more: str) -> str:
        """Runs with ``more`` and returns the error; checks its form and that nothing changed."""
        before = self.snapshot()
        assert main(self.arguments(*more)) == 2
        said = self.capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("zoext: error: ")
        assert said.err.count("\n") == 1
        assert "Traceback" not in said.err
        assert self.snapshot() == before
        return said.err

    def arguments(self, *more: str) -> list[str]:
        defaults = {
            "--model": str(self.folder / "model"),
            "--data": str(self.folder / "words.jsonl"),
            "--steps": "2",
            "--lr": "0.001",
            "--device": "cpu",
            "--out": str(self.out),
        }
        if "--resume" in more:
            defaults = {"--out": str(self.out)}
        replaced = {option.partition("=")[0] for option in more}
        given = [f"{name}={value}" for name, value in defaults.items() if name not in replaced]
        return ["finetune", *given, "--quiet", *more]

    def snapshot(self) -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes())
            for path in self.folder.rglob("*")
            if path.is_file()
        }


def prepare(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """A model and data in ``folder``, and the command that fine-tunes on them."""
    tiny_bert(folder / "model")
    labelled(folder / "words.jsonl")
    return Command(folder, capsys)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Makes writing more than ``size`` bytes to a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
