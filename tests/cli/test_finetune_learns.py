"""``zoext finetune`` lowers the held-out loss of real models and writes a usable model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from support import curves
from support.tiny_models import FIXTURES, labelled, tiny_bert
from zoext.cli import main
from zoext.cli._problem import demo, models, problem
from zoext.cli._problem.evaluation import evaluate
from zoext.cli._problem.models import Base
from zoext.cli._runs.records import read_metrics
from zoext.cli._settings import Settings


def evaluations(out: Path) -> list[dict[str, float]]:
    return [record for record in read_metrics(out / "metrics.jsonl") if "valid_loss" in record]


def test_the_demo_on_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a third of the demo's lr, the result hardly depends on the processor's rounding."""
    curves.drawn(monkeypatch)
    out = tmp_path / "run"
    options = ["--demo=words", "--lr", "3e-5", "--steps", "200", "--eval-every", "200", "--device", "cpu"]
    assert main(["finetune", *options, "--out", str(out)]) == 0
    before, after = evaluations(out)
    assert after["valid_loss"] < before["valid_loss"] - 0.004
    assert after["valid_accuracy"] > before["valid_accuracy"] + 2 * before["valid_accuracy_error"]
    said = capsys.readouterr().out
    assert f"before: loss {before['valid_loss']:.4f} ± {before['valid_loss_error']:.4f}" in said
    assert f"after:  loss {after['valid_loss']:.4f} ± {after['valid_loss_error']:.4f}" in said
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")

    # transformers loads the model that was evaluated last.
    classes = models.classes_of(models.config_of(str(out / "model")), demo.LABEL_WORDS)
    assert classes == ("negative", "positive")
    model, _ = models.load(str(out / "model"), Base(False, "classification", classes, "float32", 0))
    words = demo.load(demo.SETTINGS)
    again = evaluate(model, words.objective, words.valid, 32, torch.device("cpu"))
    assert again.loss.value == pytest.approx(after["valid_loss"], rel=1e-5)
    frozen = {name: tensor for name, tensor in words.model.state_dict().items() if "embeddings" in name}
    assert frozen
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in frozen.items())


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the small language model is not beside this checkout")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_language_model_on_fables(tmp_path: Path, dtype: str) -> None:
    arguments = {
        "--model": str(FIXTURES / "stories260k"),
        "--data": str(FIXTURES / "fables_train.txt"),
        "--valid-data": str(FIXTURES / "fables_valid.txt"),
        "--steps": "60",
        "--eval-every": "60",
        "--batch-size": "8",
        "--max-length": "48",
        "--lr": "1e-4",
        "--dtype": dtype,
        "--device": "cpu",
        "--out": str(tmp_path / "run"),
    }
    assert main(["finetune", *[text for pair in arguments.items() for text in pair], "--quiet"]) == 0
    before, after = evaluations(tmp_path / "run")
    assert after["valid_loss"] < before["valid_loss"] - 0.1
    assert after["valid_perplexity"] == pytest.approx(math.exp(after["valid_loss"]))


def test_only_what_is_trainable_moves(tmp_path: Path) -> None:
    folder, words = tiny_bert(tmp_path / "model"), labelled(tmp_path / "words.jsonl")
    options = ["--trainable", r"layer\.1.*LayerNorm|classifier", "--lr", "0.01", "--steps", "3", "--quiet"]
    out = tmp_path / "run"
    assert main(["finetune", "--model", str(folder), "--data", str(words), *options, "--out", str(out)]) == 0
    settings = Settings(model=str(folder), data=str(words))
    before = problem.load(settings).model.state_dict()
    after = problem.load(Settings(model=str(out / "model"), data=str(words))).model.state_dict()
    moved = {name for name in before if not before[name].equal(after[name])}
    layer = "bert.encoder.layer.1."
    assert moved == {
        *(
            f"{layer}{part}.LayerNorm.{kind}"
            for part in ("attention.output", "output")
            for kind in ("weight", "bias")
        ),
        *(f"classifier.{kind}" for kind in ("weight", "bias")),
    }


def test_the_seed_determines_the_run(tmp_path: Path) -> None:
    folder, words = tiny_bert(tmp_path / "model"), labelled(tmp_path / "words.jsonl")
    losses = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        inputs = ["--model", str(folder), "--data", str(words), "--steps", "4", "--lr", "0.01", "--quiet"]
        assert main(["finetune", *inputs, "--seed", seed, "--out", str(tmp_path / name)]) == 0
        losses.append([record.get("loss") for record in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_each_run_without_out_gets_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, words = tiny_bert(tmp_path / "model"), labelled(tmp_path / "words.jsonl")
    for _ in range(2):
        assert (
            main(["finetune", "--model", str(folder), "--data", str(words), "--steps", "1", "--quiet"]) == 0
        )
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == ["finetune-1", "finetune-2"]
    settings = json.loads((tmp_path / "runs" / "finetune-2" / "run.json").read_text())["settings"]
    assert settings["steps"] == 1
