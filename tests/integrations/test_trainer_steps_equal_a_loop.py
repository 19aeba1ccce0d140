"""A run of ZOTrainer leaves the bits of a loop with the loss that it was told to take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, get_linear_schedule_with_warmup

import zoext
from support.trainers import InOrder, arguments, batches, tiny_llama, weights
from zoext.integrations.transformers import ZOTrainer

STEPS = 4


def loop(optimizer: torch.optim.Optimizer, model: Any, compact: bool = True) -> None:
    schedule = get_linear_schedule_with_warmup(optimizer, 1, STEPS)
    loss: Any = zoext.CompactLoss(model) if compact else lambda batch: model(**batch).loss
    model.train()
    for batch in batches(4, STEPS):
        optimizer.step(lambda batch=batch: loss(batch))
        schedule.step()


def trainer_of(model: Any, out: Path, *, given: dict[str, Any], **options: Any) -> Trainer:
    schedule = {"max_steps": STEPS, "lr_scheduler_type": "linear", "warmup_steps": 1}
    return ZOTrainer(model, arguments(out, **schedule, **options), train_dataset=InOrder(4 * STEPS), **given)


RECIPES = {
    "MeZO": {"samples": 2},
    "AdaMeZO": {"horizon": 3, "betas": [0.6, 0.8]},
    "AGZO": {"rank": 2, "balance": "matched"},
    "MeZOGreedy": {"pool_size": 3},
}


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_by_arguments(recipe: str, compact: bool, tmp_path: Path) -> None:
    model, plain = tiny_llama(), tiny_llama()
    chosen = {"zo_optimizer": recipe, "zo_options": RECIPES[recipe], "zo_compact_loss": compact}
    trainer_of(model, tmp_path, given={}, **chosen).train()
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in RECIPES[recipe].items()}
    loop(getattr(zoext, recipe)(plain, lr=2e-2, mu=2e-3, seed=5, **options), plain, compact)
    assert torch.equal(weights(model), weights(plain))
    assert not torch.equal(weights(model), weights(tiny_llama()))


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_by_an_optimizer(way: str, tmp_path: Path) -> None:
    model, plain = tiny_llama(), tiny_llama()
    if way == "optimizers":
        given: dict[str, Any] = {way: (zoext.MeZO(model, lr=1e-2, seed=7), None)}
    else:
        given = {way: (zoext.MeZO, {"lr": 1e-2, "seed": 7})}
    trainer = trainer_of(model, tmp_path, given=given)
    trainer.train()
    assert zoext.unwrap(trainer.optimizer).probe.is_exact
    mu = 1e-3 if way == "optimizers" else 2e-3  # that of the arguments
    loop(zoext.MeZO(plain, lr=1e-2, mu=mu, seed=7), plain)
    assert torch.equal(weights(model), weights(plain))


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_weight_decay_spares_norms(probe: str, tmp_path: Path) -> None:
    model, plain = tiny_llama(), tiny_llama()
    trainer_of(model, tmp_path, given={}, weight_decay=0.1, zo_options={"probe": probe}).train()
    named = list(plain.named_parameters())
    groups = [
        {"params": [pair for pair in named if "norm" not in pair[0]]},
        {"params": [pair for pair in named if "norm" in pair[0]], "weight_decay": 0.0},
    ]
    assert all(group["params"] for group in groups)
    chosen = zoext.StreamedProbe(plain) if probe == "streamed" else "inplace"
    loop(zoext.MeZO(groups, lr=2e-2, mu=2e-3, seed=5, weight_decay=0.1, probe=chosen), plain)
    # In place, an estimate and a step restore and update in two passes; the loop does both in one.
    assert torch.allclose(weights(model), weights(plain), rtol=0, atol=1e-5 * (probe == "inplace"))


def test_what_is_meant_for_gradients_changes_nothing(tmp_path: Path) -> None:
    model, plain = tiny_llama(), tiny_llama()
    trainer_of(model, tmp_path, given={}, activation_checkpointing=True, max_grad_norm=1e-6).train()
    trainer_of(plain, tmp_path, given={}).train()
    assert torch.equal(weights(model), weights(plain))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_held_steps_are_written_at_the_end(tmp_path: Path) -> None:
    """Of an interval that is longer than the run, for those who read parameters next."""
    model, plain = tiny_llama(), tiny_llama()
    options = {"refresh_interval": 50, "defer": True}
    trainer_of(model, tmp_path, given={}, zo_optimizer="LOZO", zo_options=options).train()
    read = weights(model)
    optimizer = zoext.LOZO(plain, lr=2e-2, mu=2e-3, seed=5, **options)
    loop(optimizer, plain)
    assert not torch.equal(read, weights(plain))
    optimizer.merge()
    assert torch.equal(read, weights(plain))
