"""PEFT loads an exported adapter onto the base, and its outputs are those of the side paths, to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import zoext
from support.peft_methods import TOKENS, gpt2, llama
from support.side_paths import filled, model

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and the packages that pack

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "all linear layers": (llama, {}),
    "two of several layers": (llama, {"names": ["layers.1.self_attn.q_proj", "down_proj"]}),
    "Conv1D": (gpt2, {"names": ["c_attn", "c_fc"]}),
    "layers narrower than the rank": (llama, {"rank": 20}),
    "the output layer": (llama, {"names": ["lm_head", "v_proj"]}),
}


def base_of(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@torch.no_grad()
def logits(built: Any) -> Tensor:
    return built(input_ids=TOKENS).logits


@pytest.mark.parametrize("case", MODELS)
def test_outputs_are_equal(case: str, tmp_path: Path) -> None:
    make, options = MODELS[case]
    built = base_of(make)
    before = logits(built)
    paths = zoext.attach_side_paths(built, **{"rank": 3} | options)
    filled(paths)
    expected = logits(built)
    assert (expected - before).abs().max() > 0.1
    folder = zoext.export_adapter(built, tmp_path / "adapter")
    assert sorted(each.name for each in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = peft.PeftModel.from_pretrained(base_of(make), folder)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    adapted = {name for name, each in loaded.named_modules() if isinstance(each, peft.tuners.lora.LoraLayer)}
    assert len(adapted) in (0, len(paths))  # none once they are merged


def test_a_packed_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path / "base")

    def packed() -> Any:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.bfloat16
        )

    built = packed()
    before = logits(built)
    filled(zoext.attach_side_paths(built, 4))
    zoext.export_adapter(built, tmp_path / "adapter")
    loaded = logits(peft.PeftModel.from_pretrained(packed(), tmp_path / "adapter"))
    expected = logits(built)
    scale = float(expected.abs().max())
    assert (expected - before).abs().max() > 0.1 * scale
    assert (loaded - expected).abs().max() < 0.03 * scale  # activations are bfloat16


def test_the_files_say_all(tmp_path: Path) -> None:
    built = model()
    paths = zoext.attach_side_paths(built, 4, names=["head", "packed"])
    filled(paths)
    zoext.export_adapter(built, tmp_path / "new" / "adapter")
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 4
    assert config["target_modules"] == ["head", "packed"]
    assert config["base_model_name_or_path"] is None
    tensors = load_file(tmp_path / "new" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 4
    for name, path in paths.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], path.down.weight)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], path.up.weight)


def test_names_that_others_end_with(tmp_path: Path) -> None:
    """Layer "1" is adapted, and "2.1" is not."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Tanh(), nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))

    built, x = base_of(make), torch.linspace(-1, 1, 15).view(5, 3)
    filled(zoext.attach_side_paths(built, 2, names=["1"]))
    expected = built(x)
    zoext.export_adapter(built, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base_of(make), tmp_path / "adapter")
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
    adapted = [name for name, each in loaded.named_modules() if isinstance(each, peft.tuners.lora.LoraLayer)]
    assert adapted == ["base_model.model.1"]


def _unfrozen(built: Any) -> None:
    built.first.weight.requires_grad_(True)


def _infinite(built: Any) -> None:
    built.head.side_path.up.weight.data[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (zoext.detach_side_paths, "model has no side paths; add them with zoext.attach_side_paths"),
        (_unfrozen, "trainable parameters that the adapter would lack: first.weight; save them yourself"),
        (_infinite, "head: its side path has values that are not finite"),
        (lambda built: built.head.side_path.to("meta"), "head: its side path is on the meta device"),
    ],
)
def test_what_cannot_be_exported_writes_nothing(
    spoil: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    built = model()
    zoext.attach_side_paths(built, 4)
    spoil(built)
    with pytest.raises(ValueError, match=message):
        zoext.export_adapter(built, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_folders_are_replaced_only_if_asked_for(tmp_path: Path) -> None:
    built, folder = model(), tmp_path / "adapter"
    paths = zoext.attach_side_paths(built, 4)
    zoext.export_adapter(built, folder)
    with pytest.raises(FileExistsError, match="exists; pass another folder, or replace=True"):
        zoext.export_adapter(built, folder)
    filled(paths)
    zoext.export_adapter(built, folder, replace=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.head.lora_B.weight"], paths["head"].up.weight)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has files that are no adapter: notes\.txt"):
        zoext.export_adapter(built, folder, replace=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_held_steps_are_exported(tmp_path: Path) -> None:
    """B is all zeros until ``LOZO(defer=True)`` writes its steps."""
    files = {}
    for merges in (True, False):
        built = model()
        zoext.attach_side_paths(built, 3)
        optimizer = zoext.LOZO(built, lr=0.1, rank=1, defer=True)

        def loss(built: nn.Module = built) -> Tensor:
            return built(torch.ones(2, 3, 7)).square().mean()

        optimizer.step(loss)
        if merges:
            optimizer.merge()
        folder = zoext.export_adapter(built, tmp_path / str(merges))
        files[merges] = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(value, files[True][name]) for name, value in files[False].items())
    assert any(value.any() for name, value in files[False].items() if "lora_B" in name)

    def exporting() -> Tensor:
        zoext.export_adapter(built, tmp_path / "in a closure")
        return loss()

    optimizer.step(loss)
    with pytest.raises(RuntimeError, match=r"read within a closure, where they lack steps"):
        optimizer.step(exporting)
    assert not (tmp_path / "in a closure").exists()
