"""Fabric: the optimizer that ``setup`` returns steps and accumulates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoext
from support.accelerate_loops import RECIPES, loader, loss_of, net, weights_of

fabric = pytest.importorskip("lightning.fabric", reason="needs Lightning")


def prepared(recipe: str, **options: Any) -> Any:
    each = fabric.Fabric(accelerator="cpu", **options)
    model = net()
    return each, *each.setup(model, RECIPES[recipe](model))


def plain(recipe: str) -> tuple[torch.Tensor, list[float]]:
    model = net()
    optimizer = RECIPES[recipe](model)
    losses = [optimizer.step(lambda batch=batch: loss_of(model, *batch)).item() for batch in loader(8)]
    return weights_of(model), losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_have_the_bits_of_a_plain_loop(recipe: str) -> None:
    each, model, optimizer = prepared(recipe)
    losses = []
    for batch in loader(8):
        losses.append(optimizer.step(lambda batch=batch: loss_of(model, *batch)).item())
        each.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.zero_grad()
    weights, known = plain(recipe)
    assert torch.equal(weights_of(model), weights)
    assert losses == known
    assert all(parameter.grad is None for parameter in model.parameters())


def test_estimates_accumulate() -> None:
    each, model, optimizer = prepared("MeZO")
    for batch in loader(8):
        for x, y in zip(*(part.split(4) for part in batch), strict=True):
            with each.no_backward_sync(model):
                optimizer.estimate(lambda x=x, y=y: loss_of(model, x, y))
        optimizer.step()
    torch.testing.assert_close(weights_of(model), plain("MeZO")[0], rtol=1e-4, atol=2e-6)


def test_a_checkpoint_and_a_trajectory(tmp_path: Path) -> None:
    each, model, optimizer = prepared("AdaMeZO")
    batches = list(loader(8))
    with zoext.Trajectory(tmp_path / "run.jsonl", optimizer):
        for batch in batches:
            optimizer.step(lambda batch=batch: loss_of(model, *batch))
    each.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    _, other, again = prepared("AdaMeZO")
    each.load(tmp_path / "state.ckpt", {"model": other, "optimizer": again})
    replayed = net()
    zoext.replay(replayed, tmp_path / "run.jsonl")
    assert torch.equal(weights_of(replayed), weights_of(model))
    for continued, stepping in ((model, optimizer), (other, again)):
        stepping.step(lambda continued=continued: loss_of(continued, *batches[0]))
    assert torch.equal(weights_of(other), weights_of(model))


def test_bf16_works_and_the_gradient_scaler_is_refused() -> None:
    _, model, optimizer = prepared("MeZO", precision="bf16-mixed")
    x, y = next(iter(loader(8)))
    assert optimizer.step(lambda: loss_of(model, x, y)).isfinite()
    scaler = torch.amp.GradScaler("cpu")
    plugin = fabric.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    _, model, optimizer = prepared("MeZO", plugins=[plugin])
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported if GradScaler"):
        optimizer.step(lambda: loss_of(model, x, y))
    assert torch.equal(weights_of(model), before)
