"""accumulate_grad_batches gives the step of the one large batch, whatever the recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.lightning_modules import RECIPES, Module, fit, loader, loss_of, net, pl, plain_run, weights_of

IGNORED = -100


@pytest.mark.parametrize(("recipe", "size"), [("MeZO", 2), ("AdaMeZO", 4), ("MeZOGV", 4), ("MeZOGreedy", 2)])
def test_groups_are_one_large_batch(recipe: str, size: int) -> None:
    """The last batch of an epoch has four samples: an incomplete group."""
    module = Module(RECIPES[recipe])
    trainer = fit(module, size, accumulate_grad_batches=8 // size)
    weights, losses = plain_run(RECIPES[recipe])
    torch.testing.assert_close(weights_of(module), weights, rtol=1e-4, atol=2e-6)
    assert trainer.global_step == len(losses) == 8
    told = [loss for loss in module.losses if loss == loss]
    torch.testing.assert_close(told, losses, rtol=1e-5, atol=1e-6)
    assert module.hooks["train_batch_end"] == len(module.losses) == 2 * -(-28 // size)
    assert module.hooks["before_optimizer_step"] == module.hooks["before_zero_grad"] == 8


def test_the_basis_of_agzo_is_that_of_the_whole_group() -> None:
    """Micro-batches of one sample each span what the large batch spans, if the rank is that of the batch."""

    def make(model: nn.Module) -> zoext.ZerothOrderOptimizer:
        return zoext.AGZO(model, lr=0.02, mu=0.01, rank=4, seed=3)

    module = Module(make)
    fit(module, 2, count=4, accumulate_grad_batches=2, max_epochs=1)
    model = nn.ModuleDict({"net": net()})
    optimizer = make(model)
    (batch,) = loader(4, 4)
    halves = [[part[:2] for part in batch], [part[2:] for part in batch]]
    optimizer.step(lambda: sum(loss_of(model["net"], *half) for half in halves) / 2)
    torch.testing.assert_close(weights_of(module), weights_of(model), rtol=1e-5, atol=1e-6)


def test_ragged_batches_count_by_samples() -> None:
    """Batches of 5, 5, 4 in one group."""
    module = Module()
    fit(module, 5, count=14, accumulate_grad_batches=3, max_epochs=1)
    model = nn.ModuleDict({"net": net()})
    optimizer = RECIPES["MeZO"](model)
    (batch,) = loader(14, 14)
    optimizer.step(lambda: loss_of(model["net"], *batch))
    torch.testing.assert_close(weights_of(module), weights_of(model), rtol=1e-5, atol=1e-6)


def labels_of(batch: Any) -> Tensor:
    """Ragged labels; the first two samples have none."""
    return torch.where(batch[0][:, 0] > 0.2, batch[1], IGNORED)


def test_loss_weight_counts_what_the_loss_is_a_mean_of() -> None:
    class Ragged(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.net, batch[0], labels_of(batch))

        def loss_weight(self, batch: Any) -> Any:
            return (labels_of(batch) != IGNORED).sum()

    ends = []
    for size in (8, 4, 2):
        module = Ragged()
        fit(module, size, count=24, max_epochs=1, accumulate_grad_batches=8 // size)
        ends.append(weights_of(module))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=2e-6)


def test_a_group_that_was_interrupted_is_dropped() -> None:
    class Leaving(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if (self.trainer.current_epoch, batch_idx) == (0, 1) else None

        def configure_optimizers(self) -> Any:
            return self.make(self)

    module = Leaving()
    fit(module, 14, accumulate_grad_batches=2)
    assert module.hooks["training_step"] == 4  # two probes of the two batches of the second epoch


def test_the_number_may_change_between_epochs() -> None:
    callback = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    module = Module()
    trainer = fit(module, 7, callbacks=[callback])
    assert trainer.global_step == 4 + 2
    assert all(loss == loss for loss in module.losses[:4])


def test_a_skipped_micro_batch_is_refused() -> None:
    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="returned None for a micro-batch"):
        fit(Skipping(), 7, accumulate_grad_batches=2)
