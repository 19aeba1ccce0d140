"""Manual optimization: steps through ``self.optimizers()`` advance ``trainer.global_step``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.lightning_modules import RECIPES, Module, fit, loss_of, plain_run, weights_of


class Manual(Module):
    def __init__(self, way: str = "closure", recipe: str = "MeZO") -> None:
        super().__init__(RECIPES[recipe])
        self.automatic_optimization = False
        self.way = way

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers(use_pl_optimizer=self.way != "raw")

        def closure() -> torch.Tensor:
            return loss_of(self.net, *batch)

        if self.way == "closure":
            loss = optimizer.step(closure)
        else:
            loss = optimizer.estimate(closure).loss
            optimizer.step()
        self.lr_schedulers().step()
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("recipe", ["MeZO", "AGZO"])
@pytest.mark.parametrize("way", ["closure", "estimate", "raw"])
def test_steps_count(way: str, recipe: str) -> None:
    module = Manual(way, recipe)
    trainer = fit(module, max_epochs=-1, max_steps=8)
    weights, losses = plain_run(RECIPES[recipe])
    assert torch.equal(weights_of(module), weights)
    assert module.losses == losses
    assert trainer.global_step == 8
    assert all(parameter.grad is None for parameter in module.parameters())
