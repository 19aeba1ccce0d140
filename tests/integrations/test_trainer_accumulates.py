"""Accumulated micro-batches give the step of the one large batch, for every recipe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import zoext
from support.trainers import (
    InOrder,
    Ragged,
    Regression,
    arguments,
    batches,
    logs,
    tiny_llama,
    trained,
    weights,
)
from zoext.integrations.transformers import ZOTrainer

RECIPES: dict[str, dict[str, Any]] = {
    "MeZO": {},
    "AdaMeZO": {"horizon": 2},
    "LOZO": {"refresh_interval": 2},
    "MeZOGV": {"pool_size": 2},
    "MeZOGreedy": {"pool_size": 2},
}
SPLITS = [(2, 4), (4, 2)]


def options(size: int, count: int) -> dict[str, Any]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}


def assert_close(a: ZOTrainer, b: ZOTrainer) -> None:
    begin = weights(tiny_llama())
    moved = (weights(b) - begin).norm()
    assert moved > 1e-3
    assert (weights(a) - weights(b)).norm() < 1e-2 * moved  # projected gradients differ in their last bits
    assert logs(a, "loss") == pytest.approx(logs(b, "loss"), rel=1e-5)
    assert logs(a, "projected_gradient") == pytest.approx(logs(b, "projected_gradient"), rel=5e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_ragged_labels(recipe: str, tmp_path: Path) -> None:
    chosen = {"zo_optimizer": recipe, "zo_options": RECIPES[recipe], "max_steps": 2}
    whole = trained(tmp_path, **options(8, 1), **chosen)
    for split in SPLITS if recipe == "MeZO" else SPLITS[:1]:
        assert_close(trained(tmp_path, **options(*split), **chosen), whole)


def test_label_smoothing_and_last_groups(tmp_path: Path) -> None:
    """20 examples: each epoch ends with a group of 4, of two micro-batches of 2 instead of four."""
    chosen = {"size": 20, "max_steps": 4, "label_smoothing_factor": 0.2}
    whole = trained(tmp_path, **options(8, 1), **chosen)
    for split in SPLITS:
        assert_close(trained(tmp_path, **options(*split), **chosen), whole)
    assert logs(whole, "epoch")[:4] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])


def test_a_model_that_returns_means(tmp_path: Path) -> None:
    ends = []
    for split in [(8, 1), *SPLITS]:
        trainer = trained(tmp_path, Regression(), size=20, max_steps=4, **options(*split))
        ends.append((logs(trainer, "loss"), weights(trainer)))
    for losses, end in ends[1:]:
        assert losses == pytest.approx(ends[0][0], rel=1e-5)
        assert torch.allclose(end, ends[0][1], atol=1e-5)


class Indifferent(Regression):
    """Takes any keyword, as BERT, T5 and BART do, and returns a mean all the same."""

    def forward(self, input_ids: Tensor, labels: Tensor, **ignored: Any) -> dict[str, Tensor]:
        return super().forward(input_ids, labels)


class OwnMean(ZOTrainer):
    """Returns a float, such as a reward."""

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, num_items_in_batch: Any = None) -> Any:
        return float(model(**inputs)["loss"])


@pytest.mark.parametrize("kind", [ZOTrainer, OwnMean])
def test_a_mean_where_trainer_expects_a_share(kind: type[ZOTrainer], tmp_path: Path) -> None:
    ends = []
    for split in [(8, 1), *SPLITS]:
        args = arguments(tmp_path, max_steps=2, **options(*split))
        trainer = kind(Indifferent(), args, train_dataset=Ragged(24))
        trainer.train()
        ends.append(trainer)
    for end in ends[1:]:
        assert logs(end, "loss") == pytest.approx(logs(ends[0], "loss"), rel=1e-5)
        assert torch.allclose(weights(end), weights(ends[0]), atol=1e-5)


def test_compute_loss_func_is_a_sum(tmp_path: Path) -> None:
    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return (
            nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        )

    ends = []
    for split in [(8, 1), *SPLITS]:
        trainer = ZOTrainer(
            tiny_llama(),
            arguments(tmp_path, **options(*split)),
            train_dataset=Ragged(24),
            compute_loss_func=loss_of,
        )
        trainer.train()
        ends.append(trainer)
    for end in ends[1:]:
        assert_close(end, ends[0])


def test_agzo_has_a_basis_of_all_micro_batches(tmp_path: Path) -> None:
    """The step is that of a closure over them; its basis approximates that of the large batch."""
    chosen = arguments(tmp_path, max_steps=1, zo_optimizer="AGZO", zo_options={"rank": 2}, **options(4, 2))
    trainer = ZOTrainer(tiny_llama(), chosen, train_dataset=InOrder(8))
    trainer.train()
    plain, micro_batches = tiny_llama(), batches(4, 2)
    count = sum(batch["num_items_in_batch"] for batch in micro_batches)
    loss = zoext.CompactLoss(plain)
    zoext.AGZO(plain, rank=2, lr=2e-2, mu=2e-3, seed=5).step(
        lambda: sum(loss(batch, num_items_in_batch=count) for batch in micro_batches)
    )
    assert torch.equal(weights(trainer), weights(plain))


def test_losses_are_those_of_a_first_order_trainer(tmp_path: Path) -> None:
    """At an lr of 0, where both evaluate the same weights; the mean over two steps of a log."""
    common = {**options(2, 4), "max_steps": 4, "logging_steps": 2, "learning_rate": 0.0, "zo_mu": 1e-6}
    args = arguments(tmp_path, **common)
    ours = ZOTrainer(tiny_llama(), args, train_dataset=Ragged(20))
    plain = copy.copy(args)
    plain.optim = TrainingArguments.default_optim
    first_order = Trainer(tiny_llama(), plain, train_dataset=Ragged(20))
    ours.train()
    first_order.train()
    assert logs(ours, "loss") == pytest.approx(
        [entry["loss"] for entry in first_order.state.log_history[:-1]], rel=1e-5
    )
    assert ours.state.log_history[-1]["train_loss"] == pytest.approx(
        first_order.state.log_history[-1]["train_loss"], rel=1e-5
    )
