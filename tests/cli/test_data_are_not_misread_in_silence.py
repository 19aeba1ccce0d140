"""Data that look like something else than they are end in an error or a remark, not in another training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.tiny_models import GOOD, OTHER, tiny_language_model
from zoext.cli import main
from zoext.cli._errors import UserError
from zoext.cli._problem import choosing, data, problem
from zoext.cli._settings import Settings

CAT = "the cat,1\nthe day,0\n"
TURN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "causal"
    tiny_language_model(folder, words=("Label:", "0", "1"))
    return str(folder)


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("text,text\n" + CAT, "the header names 'text' twice"),
        ("text, label\n" + CAT, "the header names ' label', with a space"),
        ("text,label,id\n\nthe cat,1\n", "line 3: row 1 has no 'id': it has fewer fields"),
        ('text,label\n"the\ncat",1\n"the day,0\n', "line 4: a quotation mark in this row is not closed"),
    ],
)
def test_tables_with_faults(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        data.read(str(tmp_path / "a.csv"))


def test_half_a_letter(tmp_path: Path) -> None:
    """A whole pair of escapes is an emoji, and an escaped backslash is none."""
    whole = jsonl(tmp_path / "a.jsonl", {"text": "\U0001f600"}, {"text": "\\ud83d"})
    assert [row["text"] for row in data.read(whole)[0].rows] == ["\U0001f600", "\\ud83d"]
    with pytest.raises(UserError, match="line 2 has half of a pair"):
        data.read(jsonl(tmp_path / "b.jsonl", {"text": "cat"}, {"text": "\ud83d"}))


@pytest.mark.parametrize("suffix", [".CSV", ".TSV"])
def test_suffixes_in_capitals(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    comma = "," if suffix == ".CSV" else "\t"
    (tmp_path / f"a{suffix}").write_text(f"text{comma}label\nthe cat{comma}1\n", encoding="utf-8")
    assert [row["text"] for row in data.read(str(tmp_path / f"a{suffix}"))[0].rows] == ["the cat"]
    assert capsys.readouterr().err == ""  # no bar


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"text": "the cat"}], {"label_column": "stars"}, "--label-column stars: .* no such column"),
        ([{"text": "the cat"}], {"text_column": "text,text"}, "two for pairs, each once"),
        ([{"text": "the cat"}], {"valid_data": "no.csv"}, "--valid-data no.csv: no such file"),
        ([{"text": "the cat"}], {"label_words": {"0": "a", "1": "b"}}, "needs a column 'label'"),
        ([{"prompt": TURN, "completion": "a"}], {}, "prompt is a list of messages.*column 'messages'"),
        ([{"conversations": []}], {}, "call it messages"),
        ([{"messages": "hi"}], {}, "messages is 'hi': it must be a list"),
        ([{"messages": [*TURN, {"from": "gpt"}]}], {}, "message 3 is .*needs role and content"),
        ([{"messages": [{"role": "user", "content": None}]}], {}, "content of message 1 is None, not a text"),
    ],
)
def test_rows_of_other_programs(
    model: str, tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], expected: str
) -> None:
    settings = Settings(model=model, data=jsonl(tmp_path / "a.jsonl", *rows), **options)
    with pytest.raises(UserError, match=expected):
        problem.load(settings)


def test_columns_that_are_not_read_are_named(model: str, tmp_path: Path) -> None:
    rows = [{"text": f"the {word}", "stars": 1} for word in OTHER]
    settings = Settings(model=model, data=jsonl(tmp_path / "a.jsonl", *rows))
    assert any("stars" in note and "--label-column" in note for note in problem.load(settings).notes)


@pytest.mark.parametrize("column", ["output", "response"])
def test_instructions(model: str, tmp_path: Path, column: str) -> None:
    rows = [{"instruction": f"the {word}", column: "the cat"} for word in OTHER]
    settings = Settings(model=model, data=jsonl(tmp_path / "a.jsonl", *rows), template="{instruction} Label:")
    assert problem.load(settings).settled["task"] == "completion"


@pytest.mark.parametrize("words", [("0.0", "1.0"), ("-1", "+1")])
def test_numbers_are_no_words(words: tuple[str, str]) -> None:
    settings = Settings(label_words={"a": words[0], "b": words[1]})
    table = data.Table("here", ({"text": "the cat", "label": "a"},))
    task = choosing.task_of("label-words", settings, table, "causal", ("a", "b"))
    assert choosing.words_are_numbers(task)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"text": f"the {GOOD[0]}"}, ["--label-words=a=kind,b=grim", "--template={text}"]),
        ({"prompt": "the cat"}, ["--max-new-tokens=2"]),
        ({"question": "the cat", "choices": ["kind", "grim"]}, ["--template={question}"]),
        ({"question": "the cat"}, ["--max-new-tokens=2", "--template={question}"]),
    ],
)
def test_rows_without_answers_tell_the_task(
    model: str, tmp_path: Path, row: dict[str, Any], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path / "a.jsonl", row)
    assert main(["predict", f"--model={model}", f"--data={file}", "--device=cpu", *options]) == 0
    assert "prediction" in json.loads(capsys.readouterr().out)


def test_answers_that_could_not_be_written(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is not asked first: there is none."""
    file = jsonl(tmp_path / "a.jsonl", {"prompt": "the cat"})
    for out, expected in ((tmp_path, "is a folder"), (tmp_path / "no" / "a", "is no folder")):
        assert main(["predict", "--model=no", f"--data={file}", f"--out={out}", "--overwrite"]) == 2
        assert expected in capsys.readouterr().err
    file = jsonl(tmp_path / "b.jsonl", {"prompt": "the cat", "prediction": "old"})
    assert main(["predict", f"--model={model}", f"--data={file}", "--max-new-tokens=2"]) == 2
    assert "has a column 'prediction'" in capsys.readouterr().err
