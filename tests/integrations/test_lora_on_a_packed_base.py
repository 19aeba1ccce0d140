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
from support.packings import PACKINGS
from support.peft_methods import TOKENS, llama
from support.tiny_models import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that pack


def adapted(packing: str, folder: Path) -> peft.PeftModel:
    """A tiny model that is packed, with adapters."""
    config = PACKINGS[packing]()
    llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(base, lora)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("direction", [zoext.Gaussian(), zoext.LowRank(rank=2)], ids=["dense", "factored"])
def test_the_base_runs_once_for_all_copies(packing: str, direction: zoext.Direction, tmp_path: Path) -> None:
    """A batched step has the losses of a streamed one, to what batches change in 16-bit and int8 products."""
    model = adapted(packing, tmp_path)
    losses: dict[str, torch.Tensor] = {}

    def closure(copies: int) -> torch.Tensor:
        tokens = zoext.repeat(TOKENS, copies)
        logits = model(input_ids=tokens).logits[:, :-1].mT.float()
        each = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
        return zoext.mean_per_copy(each, copies)

    calls: list[int] = []
    packed = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    packed.register_forward_hook(lambda *_: calls.append(1))
    for probe in ("streamed", "batched"):
        found: list[torch.Tensor] = []

        def run(copies: int = 1, found: list[torch.Tensor] = found, one: bool = probe == "streamed") -> Any:
            losses = closure(copies)
            found.extend(losses)
            return losses[0] if one else losses

        estimator = zoext.CentralDifference(samples=2)
        optimizer = zoext.ZerothOrderOptimizer(
            model, direction=direction, estimator=estimator, mu=0.1, lr=1e-3, seed=3, probe=probe
        )
        for _ in range(3):  # the first two begin with forwards that check the copies
            found.clear()
            calls.clear()
            optimizer.estimate(run)
        losses[probe] = torch.stack(found[-4:])
        assert len(calls) == (1 if probe == "batched" else len(found))
    torch.testing.assert_close(losses["batched"], losses["streamed"], rtol=1e-2, atol=0)
    assert len(set(losses["batched"].tolist())) == 4


@pytest.mark.parametrize("packing", PACKINGS)
def test_adapters_train(packing: str, tmp_path: Path) -> None:
    model = adapted(packing, tmp_path)
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
