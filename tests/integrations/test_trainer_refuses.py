"""What ZOTrainer cannot do is refused by name, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import zoext
from support.trainers import Ragged, arguments, tiny_llama, weights
from zoext.integrations.transformers import ZOTrainer


def plain(out: Path) -> TrainingArguments:
    return TrainingArguments(str(out), report_to=[], use_cpu=True, max_steps=1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fp16", True, "fp16=True scales gradients, and a forward-only optimizer has none; use bf16=True"),
        ("deepspeed", "ds.json", "DeepSpeed shards the weights"),
        ("fsdp", ["full_shard"], "FSDP shards the weights"),
    ],
)
def test_by_the_arguments(name: str, value: Any, message: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, value)  # their own checks need a GPU, DeepSpeed, or several processes
    with pytest.raises(ValueError, match=message):
        ZOTrainer(tiny_llama(), args, train_dataset=Ragged(8))


def test_several_gpus_in_one_process(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    trainer = ZOTrainer(tiny_llama(), args, train_dataset=Ragged(8))
    with pytest.raises(ValueError, match=r"one process has 2 GPUs.*torchrun --nproc_per_node 2"):
        trainer.train()


def test_no_optimizer_and_those_of_others(tmp_path: Path) -> None:
    model = tiny_llama()
    for given in (
        {},
        {"optimizers": (torch.optim.SGD(model.parameters()), None)},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-3})},
    ):
        trainer = ZOTrainer(model, plain(tmp_path), train_dataset=Ragged(8), **given)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"needs an optimizer of zoext, not .*: ZOTrainingArguments"):
            trainer.train()
    assert torch.equal(weights(model), weights(tiny_llama()))


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    optimizer = zoext.MeZO(tiny_llama())
    trainer = ZOTrainer(tiny_llama(), plain(tmp_path), train_dataset=Ragged(8), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"optimizers: 12 of the 12 parameters .* are not the model's"):
        trainer.train()
