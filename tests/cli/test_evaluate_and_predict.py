"""``zoext evaluate`` finds what a run found, and ``zoext predict`` answers rows without answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.tiny_models import BAD, GOOD, OTHER, labelled, tiny_bert, tiny_language_model
from zoext.cli import main
from zoext.cli._problem.models import quiet_transformers

WORDS = ("Review:", "Sentiment:", "Label:", "0", "1")


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short runs of a prompted and of a classifying model; neither data set has a held-out part."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_language_model(folder / "causal", words=WORDS)
    tiny_bert(folder / "classifier")
    data = labelled(folder / "words.jsonl", examples=60)
    common = [f"--data={data}", "--steps=20", "--lr=2e-3", "--device=cpu", "--quiet", "--seed=3"]
    words = ["--label-words=0=grim,1=kind", "--template=Review: {text} Sentiment:"]
    for name, more in (("causal", words), ("classifier", [])):
        model, out = f"--model={folder / name}", f"--out={folder / name}-run"
        assert main(["finetune", model, out, *common, *more]) == 0
    return folder


@pytest.mark.parametrize("name", ["causal", "classifier"])
def test_a_run_is_evaluated_as_it_was(runs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / f"{name}-run"
    assert main(["evaluate", str(run), "--json", "--device=cpu"]) == 0
    (found,) = lines_of(capsys.readouterr().out)
    last = lines_of((run / "metrics.jsonl").read_text())[-1]
    assert found["examples"] == 6
    for key in ("loss", "loss_error", "accuracy", "accuracy_error"):
        assert found[key] == pytest.approx(last[f"valid_{key}"], rel=1e-6)


@pytest.mark.parametrize("name", ["causal", "classifier"])
def test_predictions_are_the_answers_of_the_model(
    runs: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The accuracy of the predictions is that of ``evaluate`` on the same rows."""
    rows = [{"text": f"the {word} was very", "id": index} for index, word in enumerate(GOOD + BAD + OTHER)]
    asked = jsonl(tmp_path / "asked.jsonl", rows)
    run = str(runs / f"{name}-run")
    out = tmp_path / "answers.jsonl"
    assert main(["predict", run, f"--data={asked}", f"--out={out}", "--device=cpu", "--batch-size=5"]) == 0
    answers = lines_of(out.read_text())
    assert [
        {**row, "prediction": answer["prediction"]} for row, answer in zip(rows, answers, strict=True)
    ] == answers
    assert {answer["prediction"] for answer in answers} <= {"0", "1"}
    told = jsonl(tmp_path / "told.jsonl", [{"text": a["text"], "label": a["prediction"]} for a in answers])
    capsys.readouterr()
    assert main(["evaluate", run, f"--data={told}", "--json", "--device=cpu"]) == 0
    (found,) = lines_of(capsys.readouterr().out)
    assert (found["accuracy"], found["examples"]) == (1.0, len(rows))


def test_a_model_without_a_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = labelled(tmp_path / "words.jsonl", examples=9)
    options = [f"--model={runs / 'causal'}", f"--data={data}", "--label-words=0=grim,1=kind", "--device=cpu"]
    assert main(["evaluate", *options]) == 0
    said = capsys.readouterr().out
    assert "9 examples\nloss " in said
    assert ", accuracy 0." in said
    assert main(["predict", *options]) == 0
    assert len(lines_of(capsys.readouterr().out)) == 9


@torch.no_grad()
def test_calibrated_scores(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As by hand: the log-probabilities of the words less those after a prompt about "N/A"."""
    rows = [{"text": f"the {word}", "label": index % 2} for index, word in enumerate(GOOD + BAD)]
    data = jsonl(tmp_path / "a.jsonl", rows)
    words = ["--label-words=0=grim,1=kind", "--template={text} Label:"]
    options = [
        f"--model={runs / 'causal'}",
        f"--data={data}",
        *words,
        "--device=cpu",
        "--calibrate",
        "--json",
    ]
    assert main(["evaluate", *options, "--calibrate", "--json"]) == 0
    (found,) = lines_of(capsys.readouterr().out)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(runs / "causal").eval()
        tokenizer = AutoTokenizer.from_pretrained(runs / "causal")

    def scores(text: str) -> torch.Tensor:
        tokens = torch.tensor([tokenizer(f"{text} Label:")["input_ids"]])
        return model(tokens).logits[0, -1].log_softmax(0)[tokenizer.convert_tokens_to_ids(["grim", "kind"])]

    prior = scores("N/A")
    losses = [-(scores(row["text"]) - prior).log_softmax(0)[row["label"]].item() for row in rows]
    assert found["calibrated_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["calibrated_loss"] != pytest.approx(found["loss"], rel=1e-3)


def test_completions_are_generated(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"the {word} was", "completion": " kind"} for word in OTHER]
    data, run = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "run"
    options = [f"--model={runs / 'causal'}", f"--data={data}", f"--out={run}", "--device=cpu", "--quiet"]
    assert main(["finetune", *options, "--steps=1"]) == 0
    asked = jsonl(tmp_path / "b.jsonl", [{"prompt": "the cat was"}])
    assert main(["predict", str(run), f"--data={asked}", "--device=cpu", "--max-new-tokens=7"]) == 0
    (answer,) = lines_of(capsys.readouterr().out)
    assert answer["prompt"] == "the cat was"
    assert isinstance(answer["prediction"], str)
    assert main(["evaluate", str(run), "--device=cpu"]) == 0
    assert ", perplexity " in capsys.readouterr().out


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["finetune", "--demo=words", "--steps=1", f"--out={run}", "--device=cpu", "--quiet"]) == 0
    assert main(["evaluate", str(run), "--json", "--device=cpu", "--batch-size=200"]) == 0
    (found,) = lines_of(capsys.readouterr().out)
    last = lines_of((run / "metrics.jsonl").read_text())[-1]
    assert found["loss"] == pytest.approx(last["valid_loss"], rel=1e-4)
    asked = jsonl(tmp_path / "b.jsonl", [{"text": "negative"}, {"text": "positive"}])
    assert main(["predict", str(run), f"--data={asked}", "--device=cpu"]) == 0
    assert [each["prediction"] for each in lines_of(capsys.readouterr().out)] == ["negative", "positive"]


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("evaluate", [], "give the folder of a run, or --model and --data"),
        ("predict", ["--model=MODELS/causal"], "give the folder of a run, or --model and --data"),
        ("evaluate", ["none"], "none: holds no run of zoext finetune; give its --out"),
        ("evaluate", ["MODELS/causal-run", "--model=other"], "--model other: the run in"),
        ("predict", ["MODELS/causal-run", "--data=DATA/none.csv"], "none.csv: no such file"),
        ("predict", ["MODELS/causal-run", "--data=DATA/odd.jsonl"], "no column 'text'; it has review"),
        ("evaluate", ["MODELS/causal-run", "--data=DATA/new.jsonl"], "needs a column 'label'"),
        (
            "predict",
            ["--model=MODELS/causal", "--data=DATA/new.jsonl", "--task=label-words"],
            "--label-words LABEL",
        ),
        ("predict", ["--model=MODELS/causal", "--data=DATA/new.jsonl"], "plain text has no answers"),
        ("evaluate", ["MODELS/classifier-run", "--calibrate"], "only label words are calibrated"),
        (
            "predict",
            ["MODELS/causal-run", "--data=DATA/new.jsonl", "--out=DATA/odd.jsonl"],
            "exists; give --overwrite",
        ),
    ],
)
def test_what_cannot_be_asked(
    runs: Path,
    tmp_path: Path,
    command: str,
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    jsonl(tmp_path / "odd.jsonl", [{"review": "so"}])
    jsonl(tmp_path / "new.jsonl", [{"text": "so very"}, {"text": "very so"}])
    given = [each.replace("MODELS", str(runs)).replace("DATA", str(tmp_path)) for each in arguments]
    assert main([command, *given, "--device=cpu"]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_a_run_without_a_model(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_bytes((runs / "causal-run" / "run.json").read_bytes())
    assert main(["evaluate", str(tmp_path), "--device=cpu"]) == 2
    assert "has no model yet; let the run end" in capsys.readouterr().err


def test_rows_without_the_label_column_of_the_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"comment": f"the {word}", "stars": index % 2} for index, word in enumerate(OTHER)]
    data, run = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "run"
    columns = ["--text-column=comment", "--label-column=stars", "--label-words=0=grim,1=kind"]
    options = [f"--model={runs / 'causal'}", f"--data={data}", f"--out={run}", "--device=cpu", "--quiet"]
    assert main(["finetune", *options, *columns, "--steps=1"]) == 0
    asked = jsonl(tmp_path / "b.jsonl", [{"comment": "the cat"}])
    assert main(["predict", str(run), f"--data={asked}", "--device=cpu"]) == 0
    (answer,) = lines_of(capsys.readouterr().out)
    assert answer["prediction"] in ("0", "1")
    assert main(["evaluate", str(run), f"--data={asked}", "--device=cpu"]) == 2
    assert "--label-column stars" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_what_is_cut_is_said(
    runs: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": "so " * 20, "label": 0}, {"text": "kind", "label": 1}])
    run = str(runs / "causal-run")
    assert main([command, run, f"--data={data}", "--max-length=12", "--device=cpu"]) == 0
    assert "1 of 2 examples are longer than 12 tokens and lose their end" in capsys.readouterr().err
