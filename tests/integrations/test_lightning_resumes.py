"""A run that continues from a checkpoint of Lightning has the bits of the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.lightning_modules import RECIPES, Module, fit, weights_of


@pytest.mark.parametrize(
    ("recipe", "accumulate"), [("MeZO", 2), ("AdaMeZO", 1), ("AGZO", 1), ("residual", 2)]
)
def test_from_the_end_of_an_epoch(recipe: str, accumulate: int, tmp_path: Path) -> None:
    whole, first, second = (Module(RECIPES[recipe]) for _ in range(3))
    fit(whole, max_epochs=3, accumulate_grad_batches=accumulate)
    trainer = fit(first, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer = fit(second, max_epochs=3, accumulate_grad_batches=accumulate, ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(weights_of(second), weights_of(whole))
    assert trainer.global_step == 3 * (4 if accumulate == 1 else 2)
    assert second.losses == pytest.approx(whole.losses[4:], rel=0, nan_ok=True)
