"""transformers' own Trainer raises before it computes a gradient, and the error names ZOTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

import zoext
from support.trainers import Ragged, arguments, tiny_llama, weights
from zoext.integrations.transformers import ZOTrainerMixin


class Own(Trainer):
    """A subclass that has its own step without a backward."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        self.optimizer.train()
        return zoext.unwrap(self.optimizer).estimate(lambda: self.compute_loss(model, dict(inputs))).loss


def trainer_of(kind: type[Trainer], model: Any, out: Path, **given: Any) -> Trainer:
    return kind(model, arguments(out), train_dataset=Ragged(24), **given)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_before_the_first_backward(way: str, tmp_path: Path) -> None:
    model = tiny_llama()
    given = (zoext.MeZO(model), None) if way == "optimizers" else (zoext.MeZO, {"lr": 1e-6})
    with pytest.raises(RuntimeError, match=r"Replace it by zoext.integrations.transformers.ZOTrainer"):
        trainer_of(Trainer, model, tmp_path, **{way: given}).train()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(weights(model), weights(tiny_llama()))


def test_steps_of_subclasses_run(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = zoext.MeZO(model, lr=1e-2)
    trainer_of(Own, model, tmp_path, optimizers=(optimizer, None)).train()
    assert optimizer.param_groups[0]["step"] == 3


def test_a_loop_may_call_train() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = zoext.MeZO(model, lr=1e-2)
    for each in (optimizer, Accelerator(cpu=True).prepare(optimizer)):
        each.train()
        each.step(lambda: model(torch.ones(3)).square().mean())
    assert optimizer.param_groups[0]["step"] == 2


def test_arguments_of_zoext_are_refused(tmp_path: Path) -> None:
    """They would be ignored, and AdamW would train."""
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"unsupported optimizer: zoext \(use ZOTrainer"):
        trainer_of(Trainer, model, tmp_path).train()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_mixin_behind_the_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match="class Wrong: name ZOTrainerMixin before Trainer among its bases"):

        class Wrong(Trainer, ZOTrainerMixin):
            pass
