"""ZOTrainer makes logits for labelled tokens only, where its loss is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import zoext
from support.tiny_language_models import tiny
from support.trainers import InOrder, arguments, logs, tiny_llama, weights
from zoext.integrations.transformers import ZOTrainer

SIZE, LENGTH, WIDTH = 4, 10, 16


def shapes_of_head(model: Any) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    return shapes


def run(model: Any, out: Path, kind: type[Trainer] = ZOTrainer, given: Any = None, **options: Any) -> Trainer:
    trainer = kind(model, arguments(out, **options), train_dataset=InOrder(48), **(given or {}))
    trainer.train()
    return trainer


def test_head_gets_rows_of_labelled_tokens(tmp_path: Path) -> None:
    model = tiny_llama()
    shapes = shapes_of_head(model)
    run(model, tmp_path, max_steps=1)
    labels = torch.stack([InOrder(4).examples[index]["labels"] for index in range(SIZE)])
    rows = int((labels[:, 1:] != -100).sum())
    assert shapes[-2:] == [(rows, WIDTH)] * 2
    assert rows < SIZE * LENGTH / 2


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"average_tokens_across_devices": False}],
    ids=["plain", "accumulating", "not averaging"],
)
@pytest.mark.parametrize("name", ["Llama, tied", "BERT", "T5"])
def test_losses_are_those_of_the_whole(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = [
        logs(run(tiny(name), tmp_path, zo_compact_loss=compact, learning_rate=0.0, **options), "loss")
        for compact in (True, False)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_autocast_of_accelerate_is_kept(tmp_path: Path) -> None:
    model = tiny_llama()
    shapes = shapes_of_head(model)
    dtypes: list[torch.dtype] = []
    model.lm_head.register_forward_hook(lambda *seen: dtypes.append(seen[2].dtype))
    ours = run(model, tmp_path, bf16=True, learning_rate=0.0)
    assert len(shapes[-1]) == 2
    assert dtypes[-1] == torch.bfloat16
    whole = run(tiny_llama(), tmp_path, bf16=True, learning_rate=0.0, zo_compact_loss=False)
    assert logs(ours, "loss") == pytest.approx(logs(whole, "loss"), rel=1e-3)


class OwnLoss(ZOTrainer):
    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        return super().compute_loss(model, inputs, *arguments, **options)


def whole_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:])


def without(out: Path, model: Any) -> Trainer:
    plain = TrainingArguments(str(out), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    plain.zo_compact_loss = False
    optimizer = zoext.MeZO(model, lr=1e-3)
    trainer = ZOTrainer(model, plain, train_dataset=InOrder(8), optimizers=(optimizer, None))
    trainer.train()
    return trainer


WHOLE: dict[str, Callable[[Any, Path], Trainer]] = {
    "zo_compact_loss": lambda model, out: run(model, out, zo_compact_loss=False),
    "zo_compact_loss of plain arguments": lambda model, out: without(out, model),
    "compute_loss": lambda model, out: run(model, out, OwnLoss),
    "compute_loss_func": lambda model, out: run(model, out, given={"compute_loss_func": whole_loss}),
    "label_smoothing_factor": lambda model, out: run(model, out, label_smoothing_factor=0.1),
}


@pytest.mark.parametrize("case", WHOLE)
def test_losses_that_read_more_get_all_logits(case: str, tmp_path: Path) -> None:
    model = tiny_llama()
    shapes = shapes_of_head(model)
    WHOLE[case](model, tmp_path)
    assert shapes
    assert all(len(shape) == 3 for shape in shapes)


class Penalised(LlamaForCausalLM):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        if output.loss is not None:
            output.loss = output.loss + output.logits.square().mean()
        return output


def test_refused_models_are_told_of_once(tmp_path: Path) -> None:
    model, plain = Penalised(tiny_llama().config), Penalised(tiny_llama().config)
    plain.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="all tokens.*zo_compact_loss.*the loss of Penalised is not") as told:
        run(model, tmp_path, remove_unused_columns=False)
    assert len([each for each in told if "zo_compact_loss" in str(each.message)]) == 1
    run(plain, tmp_path, remove_unused_columns=False, zo_compact_loss=False)
    assert torch.equal(weights(model), weights(plain))
