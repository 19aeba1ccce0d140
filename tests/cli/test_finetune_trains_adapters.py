"""``--lora`` trains LoRA adapters, and a run of them is kept, resumed, replayed and asked as any other."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from support.tiny_models import BAD, GOOD, OTHER, labelled, tiny_bert, tiny_language_model
from zoext.cli import main
from zoext.cli._problem import load
from zoext.cli._problem.models import quiet_transformers
from zoext.cli._settings import Settings

RANK = 3
ADAPTERS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_language_model(folder / "model", words=("Sentiment:",))
    labelled(folder / "words.jsonl", examples=60)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run whose best step is not its last, since its lr is too high."""
    out = folder / "first"
    assert main([*given(folder, out), "--steps=9", "--eval-every=3", "--keep=best", "--lr=0.05"]) == 0
    return out


def given(folder: Path, out: Path) -> list[str]:
    options = ["--label-words=0=grim,1=kind", "--template={text} Sentiment:", "--device=cpu", "--quiet"]
    data = [f"--model={folder / 'model'}", f"--data={folder / 'words.jsonl'}", f"--out={out}"]
    return ["finetune", *data, *options, f"--lora={RANK}"]


def evaluations(run: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "valid_loss" in record]


def settings(folder: Path, **more: Any) -> Settings:
    model, data = str(folder / "model"), str(folder / "words.jsonl")
    return Settings(**{"model": model, "data": data, "task": "causal-lm", "lora": RANK, **more})


def adapters_of(settings: Settings) -> dict[str, torch.Tensor]:
    model = load(settings, torch.device("cpu")).model
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_the_run_leaves_an_adapter_of_peft(folder: Path, run: Path) -> None:
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (RANK, 2 * RANK, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str((folder / "model").resolve())
    with quiet_transformers():
        base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        automatic = peft.AutoPeftModelForCausalLM.from_pretrained(run / "model").eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, run / "model").eval()
        found = adapted(tokens).logits
        assert torch.equal(found, automatic(tokens).logits)
    assert not torch.allclose(found, plain, atol=1e-4)
    kept = automatic.get_base_model().state_dict()
    assert all(kept[name.replace("proj.", "proj.base_layer.")].equal(before[name]) for name in before)


def test_the_settings_are_kept(run: Path) -> None:
    assert json.loads((run / "run.json").read_text())["settings"]["lora"] == RANK
    assert f"lora = {RANK}" in (run / "config.toml").read_text()


def test_checkpoints_have_the_adapters_alone(run: Path) -> None:
    (path,) = (run / "checkpoints").glob("*/weights.safetensors")
    assert all(".lora_" in name for name in load_file(path) if "rotary" not in name)


def test_a_replay_has_the_bytes_of_the_run(folder: Path, run: Path, tmp_path: Path) -> None:
    best = min(evaluations(run), key=lambda record: record["valid_loss"])["step"]
    assert 0 <= best < 9
    for step, out in ((best, tmp_path / "best"), (9, tmp_path / "last")):
        command = ["replay", str(folder / "model"), str(run), f"--to-step={step}", f"--out={out}", "--quiet"]
        assert main(command) == 0
    assert (tmp_path / "best" / ADAPTERS).read_bytes() == (run / "model" / ADAPTERS).read_bytes()
    assert (tmp_path / "last" / ADAPTERS).read_bytes() != (run / "model" / ADAPTERS).read_bytes()


def test_a_resumed_run_has_the_bits_of_a_whole_one(folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*given(folder, whole), "--steps=5"]) == 0
    assert main([*given(folder, parts), "--steps=2"]) == 0
    assert main(["finetune", f"--out={parts}", "--resume", "--steps=5", "--quiet"]) == 0
    assert (parts / "model" / ADAPTERS).read_bytes() == (whole / "model" / ADAPTERS).read_bytes()


def test_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint has the adapters alone, so the rest must be what it was."""
    tiny_language_model(tmp_path / "model", words=("Sentiment:",))
    labelled(tmp_path / "words.jsonl")
    out = tmp_path / "run"
    assert main([*given(tmp_path, out), "--steps=1"]) == 0
    tiny_language_model(tmp_path / "model", seed=4, words=("Sentiment:",))
    resumed = ["finetune", f"--out={out}", "--resume", "--steps=2", "--quiet"]
    assert main(resumed) == 2
    assert "data, tokenizer or base model mismatch; resume with the data" in capsys.readouterr().err
    (tmp_path / "model").rename(tmp_path / "moved")
    assert main(["evaluate", str(out), "--device=cpu"]) == 2
    assert "model is not there; write in adapter_config.json of it where it is now" in capsys.readouterr().err


def test_a_run_is_evaluated_and_predicts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--json", "--device=cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = min(evaluations(run), key=lambda record: record["valid_loss"])
    assert found["loss"] == pytest.approx(best["valid_loss"], rel=1e-6)
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"text": "the day"}) + "\n", encoding="utf-8")
    assert main(["predict", str(run), f"--data={asked}", "--device=cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"] in ("0", "1")


def test_the_weights_are_a_function_of_the_seed(folder: Path) -> None:
    state = torch.random.get_rng_state()
    first, again = (adapters_of(settings(folder, seed=4)) for _ in range(2))
    other = adapters_of(settings(folder, seed=5))
    assert torch.random.get_rng_state().equal(state)
    assert all(first[name].equal(again[name]) for name in first)
    down = [name for name in first if "lora_A" in name]
    assert len(down) == 14
    assert not any(first[name].equal(other[name]) for name in down)
    assert all(first[name].shape[0] == RANK for name in down)


def test_trainable_narrows_the_adapters(folder: Path) -> None:
    names = adapters_of(settings(folder, trainable=r"layers\.1\..*lora_B"))
    assert len(names) == 7
    assert all("layers.1." in name and "lora_B" in name for name in names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_classifier_keeps_its_head(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three classes, which the base does not know."""
    tiny_bert(tmp_path / "model")
    words = [(word, label) for label, words in enumerate((GOOD, BAD, OTHER)) for word in words[:3]]
    rows = [{"text": f"so {word} {other}", "label": label} for word, label in words for other in OTHER]
    data, out = tmp_path / "a.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [f"--model={tmp_path / 'model'}", f"--data={data}", f"--out={out}", "--device=cpu", "--quiet"]
    assert main(["finetune", *options, "--lora=2", "--steps=4", "--lr=0.01", f"--dtype={dtype}"]) == 0
    assert main(["evaluate", str(out), "--json", "--device=cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(evaluations(out)[-1]["valid_loss"], rel=1e-6)
    again = ["replay", str(tmp_path / "model"), str(out), f"--out={tmp_path / 'again'}", "--quiet"]
    assert main(again) == 0
    assert (tmp_path / "again" / ADAPTERS).read_bytes() == (out / "model" / ADAPTERS).read_bytes()


def test_an_adapter_is_trained_on_or_merged(folder: Path, run: Path) -> None:
    adapter = str(run / "model")
    kept = adapters_of(settings(folder, model=adapter))
    assert kept.keys() == adapters_of(settings(folder)).keys()
    saved = load_file(run / "model" / ADAPTERS)
    assert all(saved[name.replace(".default", "")].equal(tensor) for name, tensor in kept.items())
    tokens = torch.tensor([[5, 6, 7, 8]])
    models = [
        load(settings(folder, model=adapter, lora=rank), torch.device("cpu")).model for rank in (RANK, None)
    ]
    assert not hasattr(models[1], "peft_config")
    assert all(each.requires_grad for each in models[1].parameters())
    with torch.no_grad():
        logits = [model(tokens).logits for model in models]
    assert torch.allclose(*logits, atol=1e-5)


def test_the_default_lr_is_that_of_adapters(folder: Path, tmp_path: Path) -> None:
    assert main([*given(folder, tmp_path / "run"), "--steps=1", "--optimizer=adamezo"]) == 0
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert stored["lr"] == pytest.approx(1e-3)  # 100 times that of weights


def test_comparisons(folder: Path, tmp_path: Path) -> None:
    common = [each for each in given(folder, tmp_path / "run")[1:] if each != "--quiet"]
    more = ["--validation-fraction=0.4", "--optimizers=mezo", "--forwards=2", "--seeds=1", "--quiet"]
    assert main(["compare", *common, *more, "--lr-factors=1"]) == 0
    stored = json.loads((tmp_path / "run" / "comparison.json").read_text())["settings"]
    assert (stored["lora"], stored["lr"]) == (RANK, pytest.approx(1e-4))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainable=embed"], "--trainable 'embed': matches no parameter of the adapters; there are base_"),
        (["--model=RUN", "--lora=4"], "have rank 3; give that rank, or omit --lora"),
    ],
)
def test_what_makes_no_sense(
    folder: Path, run: Path, tmp_path: Path, options: list[str], expected: str, capsys: Any
) -> None:
    options = [each.replace("RUN", str(run / "model")) for each in options]
    assert main([*given(folder, tmp_path / "run"), *options]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_adapters_that_peft_alone_has_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without names of classes, and without weights to merge."""
    tiny_bert(tmp_path / "bert")
    tiny_language_model(tmp_path / "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what PEFT calls in transformers
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=2)
        classes = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear")
        peft.get_peft_model(classifier, classes).save_pretrained(tmp_path / "classes")
        language = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
        prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        peft.get_peft_model(language, prompts).save_pretrained(tmp_path / "prompts")
    labelled(tmp_path / "words.jsonl")
    for adapter, expected in (
        ("classes", "is the adapter of a classifier, and does not say what its outputs mean; save the"),
        ("prompts", "adapters of the type PROMPT_TUNING have no weights to merge or train here"),
    ):
        files = [f"--model={tmp_path / adapter}", f"--data={tmp_path / 'words.jsonl'}"]
        assert main(["finetune", *files, f"--out={tmp_path / 'run'}", "--device=cpu", "--quiet"]) == 2
        assert expected in capsys.readouterr().err


def test_the_demo_trains_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for demo in ("words", "reviews"):
        options = [f"--demo={demo}", "--lora=8", f"--out={tmp_path / 'run'}", "--quiet"]
        assert main(["finetune", *options]) == 2
        assert "--lora 8: the demos train weights; give --model and --data" in capsys.readouterr().err


def test_without_peft(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(given(folder, tmp_path / "run")) == 2
    assert "needs peft, not installed here: pip install 'zoext[peft]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
