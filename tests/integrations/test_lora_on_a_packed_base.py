"""LoRA trains on bases of every packing that Transformers loads here; the packed weights stop nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import zoext
from support.examples import run
from support.peft_methods import TOKENS, llama
from support.tiny_models import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that pack


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return transformers.BitsAndBytesConfig(**options)


def torchao(bits: int) -> Any:
    pytest.importorskip("torchao", reason="needs torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

    packing = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(weight_dtype=torch.int4)
    return transformers.TorchAoConfig(packing)


def quanto() -> Any:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    return transformers.QuantoConfig(weights="int8")


PACKINGS = {
    "NF4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8 of bitsandbytes": lambda: bitsandbytes(load_in_8bit=True),
    "int8 of torchao": lambda: torchao(8),
    "int4 of torchao": lambda: torchao(4),
    "int8 of quanto": quanto,
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_adapters_train(packing: str, tmp_path: Path) -> None:
    config = PACKINGS[packing]()
    llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    adapters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all("lora" in name for name in adapters)
    before = {name: each.detach().clone() for name, each in adapters.items()}
    slopes = []
    for probe in ("inplace", "streamed"):
        with torch.no_grad():
            for name, each in adapters.items():
                each.copy_(before[name])
        optimizer = zoext.MeZO(model, lr=1e-3, mu=1e-2, probe=probe)
        estimate = optimizer.estimate(lambda: model(input_ids=TOKENS, labels=TOKENS).loss)
        slopes.append(float(estimate.coefficients))
    assert all(torch.equal(each, before[name]) for name, each in adapters.items())
    optimizer.step()
    assert not any(torch.equal(each, before[name]) for name, each in adapters.items())
    assert slopes[0] != 0
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-3)
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.parametrize("packing", ["nf4", "int8"])
def test_the_example(packing: str) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    folder = FIXTURES / "stories260k"
    if not folder.exists():
        pytest.skip("needs the fixture model")
    texts = (FIXTURES / "fables_train.txt").read_text(encoding="ascii").splitlines()
    with warnings.catch_warnings():
        model, losses = run("lora_on_a_packed_base.py")["train"](str(folder), texts[:2], packing, 3)
    moved = [each for name, each in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 35
    assert all(each.abs().max() > 0 for each in moved)
    assert all(2 < loss < 6 for loss in losses)
