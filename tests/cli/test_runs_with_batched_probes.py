"""``--probe batched`` takes the steps of streamed probes up to rounding; it resumes and replays exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.tiny_models import labelled, tiny_bert, tiny_deberta, tiny_language_model
from zoext.cli import main
from zoext.cli._runs.records import read_metrics

PROMPTED = ("--template=Review: {text}\\nSentiment:", "--label-words=0=grim,1=kind")
WEIGHTS = Path("model") / "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_bert(folder / "classifier")
    tiny_language_model(folder / "causal")
    labelled(folder / "rows.jsonl")
    return folder


def ran(models: Path, model: str, out: Path, *more: str) -> Path:
    """The folder of a run of five steps."""
    data = models / "rows.jsonl"
    given = [f"--model={models / model}", f"--data={data}", f"--out={out}", "--device=cpu", "--quiet"]
    prompt = PROMPTED if model == "causal" else ()
    size = () if any(each.startswith("--steps") for each in more) else ("--steps=5",)
    assert main(["finetune", *given, *prompt, *size, "--lr=2e-3", "--mu=0.01", "--batch-size=7", *more]) == 0
    return out


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("model", ["causal", "classifier"])
@pytest.mark.parametrize(
    "how",
    [
        ("--optimizer=mezo", "--options=samples=2"),
        ("--optimizer=lozo", "--gradient-accumulation=3"),
        ("--optimizer=mezo-gv", "--loss=answer"),
        ("--optimizer=agzo",),
    ],
)
def test_the_steps_of_streamed_probes(models: Path, tmp_path: Path, model: str, how: tuple[str, ...]) -> None:
    more = [each for each in how if model == "causal" or not each.startswith("--loss")]
    batched, streamed = (
        ran(models, model, tmp_path / probe, f"--probe={probe}", *more) for probe in ("batched", "streamed")
    )
    torch.testing.assert_close(
        torch.tensor(losses(batched)), torch.tensor(losses(streamed)), rtol=1e-4, atol=1e-5
    )
    found, expected = load_file(batched / WEIGHTS), load_file(streamed / WEIGHTS)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=2e-3, atol=2e-4)


def test_a_resumed_run_has_the_same_bits(models: Path, tmp_path: Path) -> None:
    """Interrupted where a whole run checks its probes, after 4 steps, and not: after 5."""
    whole = ran(models, "causal", tmp_path / "whole", "--probe=batched", "--steps=9")
    for stop in (4, 5):
        parts = ran(models, "causal", tmp_path / f"at{stop}", "--probe=batched", f"--steps={stop}")
        assert main(["finetune", f"--out={parts}", "--resume", "--steps=9", "--quiet"]) == 0
        assert (parts / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
        assert losses(parts) == losses(whole)


def test_a_run_is_replayed(models: Path, tmp_path: Path) -> None:
    run = ran(models, "causal", tmp_path / "run", "--probe=batched", "--checkpoint=trajectory")
    assert main(["replay", str(models / "causal"), str(run), f"--out={tmp_path / 'again'}", "--quiet"]) == 0
    assert (tmp_path / "again" / WEIGHTS.name).read_bytes() == (run / WEIGHTS).read_bytes()


def test_a_slice(models: Path, tmp_path: Path) -> None:
    """Of a model on its way, whose run had batched probes: evaluated one point after the other."""
    run = ran(models, "causal", tmp_path / "run", "--probe=batched")
    sizes = ["--points=3", "--directions=1", "--batches=2"]
    assert main(["visualize", "slice", f"--run={run}", *sizes, f"--out={tmp_path / 'slice'}", "--quiet"]) == 0


def test_a_comparison(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    data = ["--model", str(models / "causal"), "--data", str(models / "rows.jsonl"), *PROMPTED]
    sizes = ["--forwards=12", "--seeds=1", "--lr-factors=1", "--batch-size=5", "--lr=1e-3", "--device=cpu"]
    methods = ["--optimizers=mezo,lozo", "--probe=batched"]
    assert main(["compare", *data, *sizes, *methods, f"--out={out}", "--quiet"]) == 0
    ends = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert {each["forwards"] for each in ends if each["record"] == "end"} == {12}


def test_a_model_that_cannot_be_batched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeBERTa reads weights beside its layers."""
    tiny_deberta(tmp_path / "model")
    data = labelled(tmp_path / "rows.jsonl")
    given = [f"--model={tmp_path / 'model'}", f"--data={data}", f"--out={tmp_path / 'run'}", "--steps=1"]
    assert main(["finetune", *given, "--probe=batched", "--device=cpu", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("zoext: error: batched probe: ")
    assert error.endswith("; give --probe streamed, with --overwrite\n")
    assert error.count("\n") == 1
