"""A trajectory that a module opens records every step of the Trainer, and replays to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoext
from support.lightning_modules import RECIPES, Module, fit, weights_of


class Recording(Module):
    def __init__(self, recipe: str, path: Path, opens: str) -> None:
        super().__init__(RECIPES[recipe])
        self.path = path
        self.opens = opens

    def configure_optimizers(self) -> zoext.ZerothOrderOptimizer:
        optimizer = self.make(self)
        if self.opens == "with the optimizer":
            self.trajectory = zoext.Trajectory(self.path, optimizer, frames=True)
        return optimizer

    def on_train_start(self) -> None:
        if self.opens == "at the start":
            self.trajectory = zoext.Trajectory(self.path, self.optimizers(), frames=True)
        self.trajectory.__enter__()

    def on_train_end(self) -> None:
        self.trajectory.close()


@pytest.mark.parametrize("opens", ["with the optimizer", "at the start"])
@pytest.mark.parametrize("recipe", ["AdaMeZO", "AGZO"])
def test_a_fit_replays(recipe: str, opens: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    module = Recording(recipe, path, opens)
    fit(module, 4, accumulate_grad_batches=2)
    again = Recording(recipe, path, opens)
    assert zoext.replay(again, path).param_groups[0]["step"] == 8
    assert torch.equal(weights_of(again), weights_of(module))
