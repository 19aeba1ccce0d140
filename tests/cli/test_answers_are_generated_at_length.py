"""``--max-new-tokens`` bounds what a model generates, belongs to a run, and leaves room in its positions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.tiny_models import OTHER, tiny_language_model
from zoext.cli import main

ROWS = [{"question": f"the {word} was", "answers": ["kind", "grim"]} for word in OTHER]
LONG = {"question": "so " * 60, "answers": "kind"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model of 48 positions, and questions with answers."""
    folder = tmp_path_factory.mktemp("given")
    tiny_language_model(folder / "model", words=("Question:", "Answer:"))
    rows = [*ROWS, LONG, LONG]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = f"--data={folder / 'a.jsonl'}"
    return [f"--model={folder / 'model'}", data, "--device=cpu", "--max-length=48"]


def test_a_run_keeps_the_length(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["finetune", *given, f"--out={run}", "--steps=1", "--max-new-tokens=3"]) == 0
    said = capsys.readouterr().out
    assert "2 of 8 examples lose their end, " in said
    assert json.loads((run / "run.json").read_text())["settings"]["max_new_tokens"] == 3
    assert "max-new-tokens = 3" in (run / "config.toml").read_text()
    data = given[1]
    for more, most in (((), 3), (("--max-new-tokens=6",), 6)):
        assert main(["predict", str(run), data, "--device=cpu", *more]) == 0
        answers = [json.loads(line)["prediction"] for line in capsys.readouterr().out.splitlines()]
        lengths = [len(answer.split()) for answer in answers]
        assert 0 < max(lengths) <= most
        assert len(answers) == 8


def test_prompts_leave_room(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *given, "--max-new-tokens=30", "--max-length=40"]) == 0
    # Of the 63 tokens of two prompts and their answers, 18 and 1 stay.
    assert (
        "2 of 8 examples lose their end, 70 % of their tokens: they are longer than 40 tokens, or leave no "
        "room for --max-new-tokens in the 48 positions of the model"
    ) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--max-new-tokens must be at most 47, as the model has 48 positions, not 50"),
        (["--max-new-tokens=47"], "row 1: its prompt leaves no room for 47 new tokens"),
        (["--max-new-tokens=3", "--task=causal-lm", "--text-column=question"], "does not read it"),
    ],
)
def test_lengths_that_make_no_sense(
    given: list[str], options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *given, *options]) == 2
    assert expected in capsys.readouterr().err


def test_presets_are_answered_without_answers(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SST-2's label words are unknown to the model, so a task that generates is asked."""
    row = {"title": "the", "context": "the cat was", "question": "was the cat"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    options = [given[0], f"--data={tmp_path / 'b.jsonl'}", "--task=squad", "--device=cpu"]
    assert main(["predict", *options, "--max-new-tokens=2"]) == 0
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert isinstance(answer["prediction"], str)
    assert main(["evaluate", *options, "--max-new-tokens=2"]) == 2
    assert "needs the columns title, context, question, answers; it has title" in capsys.readouterr().err
