"""``zoext finetune`` finds out what data ask of a model, trains it so, and refuses what makes no sense."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support.tiny_models import BAD, GOOD, OTHER, labelled, tiny_bert, tiny_language_model
from zoext.cli import main
from zoext.cli._problem import problem
from zoext.cli._settings import Settings
from zoext.tasks import Answers, Choices, Classes, Completions, GeneratedAnswers

WORDS = ("Review:", "Sentiment:", "Label:", "0", "1", "is")

Fails = Callable[..., str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("models")
    for kind in ("causal", "masked", "seq2seq"):
        tiny_language_model(parent / kind, kind, words=WORDS)
    tiny_bert(parent / "classifier")
    return parent


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def reviews(path: Path) -> str:
    words = [(word, label) for label, words in ((1, GOOD), (5, BAD)) for word in words]
    rows = [f"the {other} was {word},{stars}\n" for word, stars in words for other in OTHER[1:3]]
    path.write_text("review,stars\n" + "".join(rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def fails(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    def run(model: str, data: str, *more: str) -> str:
        out = tmp_path / "run"
        options = ["--steps=1", "--device=cpu", f"--out={out}", "--quiet", *more]
        assert main(["finetune", f"--model={models / model}", f"--data={data}", *options]) == 2
        assert not out.exists()
        error = capsys.readouterr().err
        assert error.startswith("zoext: error: ")
        assert error.count("\n") == 1
        return error

    return run


ASKED: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "kind"}]}
        for word in BAD
    ],
    "completions": [{"prompt": f"the {w} is", "completion": " kind"} for w in OTHER],
    "choices": [
        {"question": f"the {w} is", "choices": ["kind", "so grim"], "answer": i % 2}
        for i, w in enumerate(OTHER)
    ],
    "answers": [{"question": f"the {w} is", "answers": ["kind", "grim"]} for w in OTHER],
    "labels": [{"text": f"the {w}", "label": i % 2} for i, w in enumerate(OTHER + GOOD)],
    "texts": [{"text": f"the {w} was so kind"} for w in OTHER],
}


@pytest.mark.parametrize(
    ("model", "data", "objective", "head"),
    [
        ("causal", "completions", Completions, "causal-lm"),
        ("seq2seq", "completions", Completions, "seq2seq-lm"),
        ("causal", "choices", Choices, "causal-lm"),
        ("causal", "answers", GeneratedAnswers, "causal-lm"),
        ("causal", "labels", Choices, "causal-lm"),
        ("masked", "labels", Choices, "masked-lm"),
        ("seq2seq", "labels", Choices, "seq2seq-lm"),
        ("classifier", "labels", Classes, "classification"),
        ("causal", "texts", Answers, "causal-lm"),
    ],
)
def test_what_the_columns_and_the_model_say(
    models: Path, tmp_path: Path, model: str, data: str, objective: type, head: str
) -> None:
    given = jsonl(tmp_path / "a.jsonl", ASKED[data])
    new = 9 if data in ("completions", "answers") else 50
    settings = Settings(model=str(models / model), data=given, validation_fraction=0.3, max_new_tokens=new)
    loaded = problem.load(settings)
    assert type(loaded.objective) is objective
    assert loaded.base.task == head


@pytest.mark.parametrize(
    ("model", "loss", "lr"),
    [("causal", "choice", "2e-3"), ("masked", "choice", "2e-3"), ("seq2seq", "answer", "1e-3")],
)
def test_prompted_runs_learn_and_replay(models: Path, tmp_path: Path, model: str, loss: str, lr: str) -> None:
    data, out = labelled(tmp_path / "a.jsonl", examples=60), tmp_path / "run"
    template = "{text} is {mask}" if model == "masked" else "Review: {text}\\nSentiment:"
    options = ["--label-words=0=grim,1=kind", f"--template={template}", f"--loss={loss}"]
    more = [f"--lr={lr}", "--mu=0.01", "--steps=80", "--eval-every=80", "--device=cpu", "--quiet"]
    given = [f"--model={models / model}", f"--data={data}", f"--valid-data={data}", f"--out={out}"]
    assert main(["finetune", *given, *options, *more]) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = (record for record in metrics if "valid_loss" in record)
    assert after["valid_loss"] < before["valid_loss"] - 0.02
    assert {"valid_accuracy", "valid_accuracy_error"} <= after.keys()
    again = tmp_path / "again"
    trajectory = str(out / "trajectory.jsonl")
    assert main(["replay", str(models / model), trajectory, f"--out={again}", "--quiet"]) == 0
    name = "model.safetensors"
    assert (again / name).read_bytes() == (out / "model" / name).read_bytes()
    resumed = ["finetune", f"--out={out}", "--resume", "--steps=81", "--quiet"]
    assert main(resumed) == 0  # all settings are read back


def test_columns_of_other_names(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--text-column=review", "--label-column=stars", "--label-words=1=kind,5=grim"]
    data, out = reviews(tmp_path / "a.csv"), tmp_path / "run"
    options = [f"--model={models / 'causal'}", f"--data={data}", f"--out={out}", "--steps=1", "--device=cpu"]
    assert main(["finetune", *options, *given]) == 0
    said = capsys.readouterr().out
    assert r"prompt '{text}\nLabel:', answered by ' kind', ' grim'" in said


def test_pairs_of_texts(models: Path, tmp_path: Path) -> None:
    rows = [{"a": f"the {w}", "b": f"so {w}", "label": i % 2} for i, w in enumerate(OTHER)]
    data = jsonl(tmp_path / "a.jsonl", rows)
    common = {"data": data, "valid_data": data, "text_column": "a,b"}
    prompted = problem.load(Settings(model=str(models / "causal"), **common))
    assert "'{text}\\n{text2}\\nLabel:'" in prompted.notes[0]
    tokens = prompted.tokenizer.decode(prompted.train[1].rows[0].tokens)
    assert tokens == "the day so day Label: 0"
    pairs = problem.load(Settings(model=str(models / "classifier"), **common))
    assert pairs.tokenizer.decode(pairs.train[1].tokens) == "the day so day"


def test_a_template_chooses_its_columns(models: Path, tmp_path: Path) -> None:
    rows = [{"premise": f"the {w}", "guess": "so kind", "label": i % 2} for i, w in enumerate(OTHER)]
    data = jsonl(tmp_path / "a.jsonl", rows)
    settings = Settings(
        model=str(models / "causal"), data=data, valid_data=data, template="{premise} is {guess} Label:"
    )
    loaded = problem.load(settings)
    assert loaded.tokenizer.decode(loaded.train[0].rows[1].tokens) == "the the is so kind Label: 1"


def test_what_is_cut_is_said(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": "so " * (30 if i % 4 == 0 else 3) + w, "label": i % 2} for i, w in enumerate(OTHER + GOOD)
    ]
    data = jsonl(tmp_path / "a.jsonl", rows)
    options = [f"--model={models / 'causal'}", f"--data={data}", f"--valid-data={data}", "--max-length=12"]
    assert main(["finetune", *options, f"--out={tmp_path / 'run'}", "--steps=1", "--device=cpu"]) == 0
    # 3 of 9 rows, in both parts: 31 tokens, the prompt's 1 and the answer's 1 become 12.
    assert "6 of 18 examples are longer than 12 tokens and lose their end, 64 % of their tokens" in (
        capsys.readouterr().out
    )


def test_answers_that_are_numbers_are_said(models: Path, tmp_path: Path) -> None:
    loaded = problem.load(
        Settings(model=str(models / "causal"), data=jsonl(tmp_path / "a.jsonl", ASKED["labels"]))
    )
    assert any("the answers are numbers" in note for note in loaded.notes)


def test_a_new_head_is_said(models: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", ASKED["labels"])
    fresh = problem.load(Settings(model=str(models / "causal"), data=data, task="classification"))
    assert any("classification head with random weights" in note for note in fresh.notes)
    assert type(fresh.objective) is Classes
    known = problem.load(Settings(model=str(models / "classifier"), data=data))
    assert not any("random weights" in note for note in known.notes)


@pytest.mark.parametrize(
    ("model", "data", "options", "expected"),
    [
        ("masked", "texts", [], "an encoder sees the tokens that it would have to predict"),
        ("seq2seq", "texts", [], "data with the columns prompt and completion"),
        ("causal", "messages", [], "the tokenizer has no chat template"),
        ("classifier", "labels", ["--task=label-words"], "predicts no tokens; give a language model"),
        ("masked", "completions", [], "Completion asks causal or seq2seq models, not masked"),
        ("causal", "labels", ["--template={txt}"], r"no column 'txt'; it has text, label"),
        ("causal", "labels", ["--template=Review:"], "--template 'Review:': needs a column in braces"),
        ("causal", "labels", ["--template={text} {label}"], "tells the answer"),
        ("causal", "labels", ["--template={text"], "write {{ and }} for braces"),
        ("causal", "labels", ["--label-words=0=kind"], "no word for the label '1'"),
        ("causal", "labels", ["--label-words=0=kind,1=kind"], "a word of its own"),
        ("causal", "labels", ["--label-words=0"], "must be NAME=VALUE"),
        ("masked", "labels", ["--label-words=0=kind cat,1=grim"], "has 2 tokens"),
        ("masked", "labels", ["--template={text}"], "must occur once, not 0 times"),
        ("causal", "labels", ["--text-column=review"], "no column 'review'; it has text, label"),
        ("causal", "labels", ["--text-column=a,b,c"], "one column, or two for pairs"),
        ("causal", "labels", ["--task=sst2"], "--task sst2 needs the columns sentence, label; it has text"),
        ("causal", "texts", ["--template=So: {text}"], "--template: --task causal-lm does not read it"),
        ("causal", "completions", ["--loss=answer"], "--loss: --task completion does not read it"),
        ("causal", "labels", ["--label-words=0=dreadful,1=kind"], "does not know ' dreadful'"),
        ("causal", "labels", ["--batch-size=100000"], "there are only 8 training examples; give as many"),
        ("causal", "labels", ["--task=sst3"], "'sst3'.*sst2"),
    ],
)
def test_what_makes_no_sense(
    fails: Fails, tmp_path: Path, model: str, data: str, options: list[str], expected: str
) -> None:
    assert re.search(expected, fails(model, jsonl(tmp_path / "a.jsonl", ASKED[data]), *options))


def test_labels_that_are_quantities(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nthe day,2\nso,1.5\nvery,.5\n", encoding="utf-8")
    assert "row 2: label is '1.5'; a label is a class, not a quantity" in fails(
        "causal", str(tmp_path / "a.csv")
    )


def test_columns_that_tell_nothing(fails: Fails, tmp_path: Path) -> None:
    error = fails("causal", reviews(tmp_path / "a.csv"))
    assert "no column 'text'; it has review, stars: name the column with --text-column" in error


def test_a_small_data_set_is_one_batch(models: Path, tmp_path: Path) -> None:
    data, out = jsonl(tmp_path / "a.jsonl", ASKED["labels"]), tmp_path / "run"
    options = [f"--model={models / 'causal'}", f"--data={data}", f"--out={out}", "--steps=1", "--device=cpu"]
    assert main(["finetune", *options, "--quiet"]) == 0
    assert json.loads((out / "run.json").read_text())["settings"]["batch_size"] == 8


def test_parquet_and_saved_data_sets(models: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"the {w}" for w in OTHER], "label": [0, 1] * 3}
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["grim", "kind"])}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "saved"))
    for source in ("a.parquet", "saved"):
        loaded = problem.load(Settings(model=str(models / "causal"), data=str(tmp_path / source)))
        assert loaded.names == ("grim", "kind")
        words = {loaded.tokenizer.decode(row.tokens[-1:]) for row in loaded.train[0].rows}
        assert words == {"grim", "kind"}
    assert len(loaded.train) == len(loaded.valid) == 6


def test_no_global_generator_is_touched(models: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    problem.load(Settings(model=str(models / "causal"), data=jsonl(tmp_path / "a.jsonl", ASKED["labels"])))
    assert torch.random.get_rng_state().equal(before)


def test_the_same_command_resumes(models: Path, tmp_path: Path) -> None:
    """Options that were given are stored as given, also those that the data complete."""
    data, out = jsonl(tmp_path / "a.jsonl", ASKED["labels"]), tmp_path / "run"
    options = [f"--model={models / 'causal'}", f"--data={data}", f"--out={out}", "--device=cpu", "--quiet"]
    options += ["--label-words=0=grim,1=kind", "--template=Review: {text} Sentiment: "]
    assert main(["finetune", *options, "--steps=1"]) == 0
    assert main(["finetune", *options, "--steps=2", "--resume"]) == 0


def test_a_head_with_other_classes(models: Path, tmp_path: Path, fails: Fails) -> None:
    """Weights of a head stay with their classes, whatever the order of the labels."""
    folder = tiny_bert(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "POSITIVE", "1": "NEGATIVE"}
    config["label2id"] = {"POSITIVE": 0, "NEGATIVE": 1}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"text": f"the {w}", "label": ("negative", "positive")[i % 2]} for i, w in enumerate(OTHER)]
    loaded = problem.load(Settings(model=str(folder), data=jsonl(tmp_path / "a.jsonl", rows)))
    assert loaded.names == ("positive", "negative")
    others = [{**row, "label": str(row["label"])[:3]} for row in rows]
    error = fails(str(folder), jsonl(tmp_path / "b.jsonl", others))
    assert "the classification head of the model has the classes POSITIVE, NEGATIVE" in error


def test_rows_of_another_form_than_the_preset(fails: Fails, tmp_path: Path) -> None:
    row = {"premise": "a", "question": "reason", "choice1": "b", "choice2": "c", "label": 0}
    error = fails("causal", jsonl(tmp_path / "a.jsonl", [row]), "--task=copa")
    assert "row 1: is not of the form of super_glue/copa (KeyError: 'reason')" in error
