"""The commands and the program of docs/getting_started.md work as printed, on a tiny model, in few steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.tiny_models import BAD, GOOD, OTHER, tiny_language_model
from zoext.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "getting_started.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    words = ("Review:", "Sentiment:", "negative", "positive")
    tiny_language_model(tmp_path / "model", words=words)
    rows = [
        f"{other} {word},{label}\n"
        for label, words in (("positive", GOOD), ("negative", BAD))
        for word in words
        for other in OTHER
    ]
    (table,) = blocks("text")
    assert table.splitlines()[0] == "text,label"
    (tmp_path / "reviews.csv").write_text(table + "".join(rows))
    (tmp_path / "new.csv").write_text("text\nso bright\nso grim\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: str) -> None:
    quick = block.replace("5000", "4").replace("--lr auto", "--lr 1e-3")
    for command in quick.removeprefix("$ zoext ").split("\n$ zoext "):
        assert main(shlex.split(command.replace("\\\n", ""))) == 0, command


def test_the_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = blocks("console")
    run(first)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["text"] for answer in answers] == ["so bright", "so grim"]
    assert {answer["prediction"] for answer in answers} <= {"negative", "positive"}
    for name in ("model", "metrics.jsonl", "curve.png", "config.toml", "trajectory.jsonl"):
        assert (folder / "runs" / "reviews" / name).exists()
    run(second)
    tuned, again = (folder / "runs" / name / "model.safetensors" for name in ("reviews/model", "again"))
    assert tuned.read_bytes() == again.read_bytes()


def test_the_program(folder: Path) -> None:
    (program,) = blocks("python")
    exec(program.replace("5000", "3"), {})
    base, tuned = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("model", "tuned"))
    assert not any(torch.equal(base[name], tuned[name]) for name in base if tuned[name].dim() > 1)
