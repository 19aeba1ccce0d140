"""A GGUF file as ``--model`` is unpacked, and then a model like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from support.tiny_models import labelled
from zoext.cli import main

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from support import gguf_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.gguf and rows.jsonl."""
    folder = tmp_path_factory.mktemp("gguf")
    config = LlamaConfig(
        vocab_size=gguf_model.VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
    gguf_model.write(folder / "model.gguf", model)
    model.save_pretrained(folder / "original")
    labelled(folder / "rows.jsonl", examples=20)
    return folder


def ran(folder: Path, out: Path, *more: str) -> Path:
    """The folder of a run of three steps that asks for a label word."""
    files = [f"--model={folder / 'model.gguf'}", f"--data={folder / 'rows.jsonl'}", f"--out={out}"]
    prompt = ["--template=Review: {text}\\nSentiment:", "--label-words=0=grim,1=kind"]
    given = ["--steps=3", "--lr=1e-3", "--mu=0.01", "--batch-size=5", "--device=cpu", "--quiet"]
    assert main(["finetune", *files, *prompt, *given, *more]) == 0
    return out


def test_a_run_begins_with_the_weights_of_the_file(folder: Path, tmp_path: Path) -> None:
    """In the order that transformers wants them in; only the norms move."""
    run = ran(folder, tmp_path / "run", "--trainable=norm")
    found, original = (load_file(each / WEIGHTS) for each in (run / "model", folder / "original"))
    assert found.keys() == original.keys()
    assert {name for name in original if not torch.equal(found[name], original[name])} == {
        name for name in original if "norm" in name
    }


def test_a_run_is_resumed_replayed_and_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = ran(folder, tmp_path / "whole"), ran(folder, tmp_path / "parts", "--steps=2")
    assert main(["finetune", f"--out={parts}", "--resume", "--steps=3", "--quiet"]) == 0
    base = str(folder / "model.gguf")
    assert main(["replay", base, str(whole), f"--out={tmp_path / 'again'}", "--quiet"]) == 0
    models = (whole / "model", parts / "model", tmp_path / "again")
    assert len({(model / WEIGHTS).read_bytes() for model in models}) == 1
    capsys.readouterr()
    for run in (whole, parts):
        assert main(["predict", str(run), f"--data={folder / 'rows.jsonl'}", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 40
    assert lines[:20] == lines[20:]
    assert {json.loads(line)["prediction"] for line in lines} <= {0, 1, "0", "1"}


def test_adapters_of_a_packed_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ran(folder, tmp_path / "run", "--lora=2", "--lr=0.05")
    adapter = load_file(run / "model" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    again = tmp_path / "again"
    assert main(["replay", str(folder / "model.gguf"), str(run), f"--out={again}", "--quiet"]) == 0
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (run / "model" / name).read_bytes()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--device=cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["loss"] == pytest.approx(last["valid_loss"], rel=1e-5)
