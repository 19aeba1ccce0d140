"""A tiny causal model, ragged data, and trainers that run them in a fraction of a second."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

import zoext
from zoext.integrations.transformers import ZOTrainer, ZOTrainingArguments

gc.freeze()  # Trainer collects garbage when training begins, which takes a second with all that is imported


def tiny_llama(dtype: torch.dtype = torch.float32, dropout: float = 0.0, **sizes: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_dropout=dropout,
        use_cache=False,
    )
    config.update(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


class Regression(nn.Module):
    """A model that is not told how many items the batch has: its loss is a mean over the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 1)
        nn.init.constant_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        predicted = self.head(input_ids.float() / 40).squeeze(1)
        return {"loss": (predicted - labels.float().mean(1) / 40).square().mean()}


class Ragged(Dataset[dict[str, Tensor]]):
    """Sequences of 10 tokens with 1 to 8 labels each."""

    def __init__(self, size: int) -> None:
        self.tokens = torch.randint(3, 40, (size, 10), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.tokens[index].clone()
        labels[2 + (index * 5) % 8 :] = -100
        return {"input_ids": self.tokens[index], "labels": labels}


class InOrder(IterableDataset[dict[str, Tensor]]):
    """The same, never shuffled."""

    def __init__(self, size: int) -> None:
        self.examples = Ragged(size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.examples[index] for index in range(len(self.examples)))


def batches(size: int, steps: int) -> list[dict[str, Tensor]]:
    """The batches that a trainer takes from ``InOrder``, with what Trainer passes to the model."""
    examples = list(InOrder(size * steps))
    taken = []
    for first in range(0, size * steps, size):
        batch = {
            key: torch.stack([each[key] for each in examples[first : first + size]])
            for key in ("input_ids", "labels")
        }
        taken.append({**batch, "num_items_in_batch": batch["labels"][:, 1:].ne(-100).sum()})
    return taken


def arguments(out: Path, **options: Any) -> ZOTrainingArguments:
    """Arguments with an lr and a mu that move the tiny model visibly."""
    common: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 2e-2,
        "zo_mu": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return ZOTrainingArguments(str(out), **{**common, **options})


def trained(out: Path, model: nn.Module | None = None, size: int = 24, **options: Any) -> ZOTrainer:
    """A trainer after ``train()``."""
    model = model if model is not None else tiny_llama()
    trainer = ZOTrainer(model, arguments(out, **options), train_dataset=Ragged(size))
    trainer.train()
    return trainer


def weights(trained: Trainer | nn.Module) -> Tensor:
    """All weights of a model in one tensor."""
    module = trained.model if isinstance(trained, Trainer) else trained
    assert isinstance(module, nn.Module)
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def logs(trainer: Trainer, key: str) -> list[float]:
    """The values that were logged under ``key``."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def optimizer_of(trainer: Trainer) -> zoext.ZerothOrderOptimizer:
    return zoext.unwrap(trainer.optimizer)
