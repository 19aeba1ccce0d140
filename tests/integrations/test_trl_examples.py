"""The examples with TRL train without a backward pass: SFT with and without LoRA, and an online reward."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from support.examples import run
from support.tiny_models import FIXTURES

MODEL = FIXTURES / "stories260k"
OPTIONS = (
    f"--model {MODEL} --use_cpu --bf16 False --report_to none --disable_tqdm True --save_strategy no "
    "--per_device_train_batch_size 4 --dataloader_pin_memory False --logging_steps 1 --max_steps 3 "
)

pytestmark = [
    pytest.mark.skipif(not MODEL.exists(), reason="needs the fixture model"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.Tensor, "backward", backward)


@pytest.mark.parametrize("adapters", [True, False])
def test_sft(adapters: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (FIXTURES / "fables_train.txt").read_text(encoding="ascii").splitlines()[:12]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="ascii")
    out = tmp_path / "out"
    own = f"--texts {tmp_path}/texts.txt --output_dir {out} --max_length 32 --learning_rate 1e-4"
    run("trl_sft.py", *OPTIONS.split(), *own.split(), *(["--lora"] if adapters else []))
    assert len(re.findall("'projected_gradient'", capsys.readouterr().out)) == 3
    if adapters:
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
        tuned = peft.PeftModel.from_pretrained(model, str(out))
        moved = [p.abs().max() > 0 for name, p in tuned.named_parameters() if "lora_B" in name]
        assert len(moved) == 35
        assert all(moved)
    else:
        base, tuned = load_file(MODEL / "model.safetensors"), load_file(out / "model.safetensors")
        assert all(not torch.equal(value, base[name]) for name, value in tuned.items())


def test_online_reward(tmp_path: Path) -> None:
    options = f"{OPTIONS} --output_dir {tmp_path} --learning_rate 1e-6".split()
    trainer = run("trl_online_reward.py", *options)["trainer"]
    assert trainer.state.log_history[-2]["forwards"] == 6
    assert any(entry.get("projected_gradient", 0) > 0 for entry in trainer.state.log_history)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_surrogate_of_grpo_has_no_slope() -> None:
    """As docs/trl.md explains: its value does not depend on the weights, only its gradient does."""
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -1.5, 1.0])

    def surrogate(logits: torch.Tensor) -> torch.Tensor:
        logprobs = logits.log_softmax(-1)[:, 0]
        return -((logprobs - logprobs.detach()).exp() * advantages).mean()

    (gradient,) = torch.autograd.grad(surrogate(logits), logits)
    assert gradient.norm() > 0.1
    assert surrogate(logits + 0.1) == surrogate(logits) == -advantages.mean()
