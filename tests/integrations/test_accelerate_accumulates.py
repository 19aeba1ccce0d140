"""Loops with ZOAccelerator: a group of micro-batches takes the step of the one large batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from support.accelerate_loops import (
    RAGGED,
    RECIPES,
    accelerator,
    loader,
    loss_of,
    net,
    plain_run,
    run,
    weights_of,
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_batches_have_the_bits_of_a_plain_loop(recipe: str) -> None:
    weights, losses = run(RECIPES[recipe], 8)
    known, known_losses = plain_run(RECIPES[recipe])
    assert torch.equal(weights, known)
    assert losses == known_losses


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "AGZO"])
def test_groups_are_one_large_batch(recipe: str, size: int) -> None:
    """The last batch of an epoch has four samples: an incomplete group."""
    weights, losses = run(RECIPES[recipe], size)
    known, known_losses = plain_run(RECIPES[recipe])
    torch.testing.assert_close(weights, known, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(losses, known_losses, rtol=1e-5, atol=1e-6)


def test_ragged_labels_count_by_their_weight() -> None:
    known, known_losses = plain_run(RECIPES["MeZO"], y=RAGGED)
    for size in (4, 2):
        weights, losses = run(RECIPES["MeZO"], size, y=RAGGED, weigh=True)
        torch.testing.assert_close(weights, known, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(losses, known_losses, rtol=1e-5, atol=1e-6)


def test_a_batch_that_the_closure_changes() -> None:
    ends = []
    for steps in (1, 2):
        with accelerator(gradient_accumulation_steps=steps) as each:
            model = net()
            model, optimizer, data = each.prepare(model, RECIPES["MeZO"](model), loader(8 // steps))

            def popping(batch: Any, model: Any = model) -> torch.Tensor:
                return loss_of(model, batch.pop("x"), batch.pop("y"))

            for x, y in data:
                with each.accumulate(model):
                    optimizer.step(popping, {"x": x, "y": y})
            ends.append(weights_of(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=2e-6)


def test_estimates_of_the_user_are_applied_at_the_step() -> None:
    with accelerator(gradient_accumulation_steps=2) as each:
        model = net()
        raw = RECIPES["MeZO"](model)
        model, optimizer = each.prepare(model, raw)
        for batch in loader(14):
            with each.accumulate(model):
                raw.estimate(lambda batch=batch: loss_of(model, *batch))
                loss = optimizer.step()
        assert loss.isfinite()
        assert raw.param_groups[0]["step"] == 1


@pytest.mark.parametrize("recipe", ["MeZO", "AdaMeZO"])
def test_a_loaded_state_continues_to_the_bit(recipe: str, tmp_path: Path) -> None:
    ends: list[Any] = []
    for stops in (False, True):
        with accelerator(gradient_accumulation_steps=2) as each:
            model = net()
            model, optimizer, data = each.prepare(model, RECIPES[recipe](model), loader(4))
            loss = partial(loss_of, model)
            for epoch in range(2):
                if stops and epoch:
                    each.save_state(tmp_path / "state")
                    optimizer.step(loss, *next(iter(loader(8))))
                    each.load_state(tmp_path / "state")
                for batch in data:
                    with each.accumulate(model):
                        optimizer.step(loss, *batch)
            ends.append(weights_of(model))
    assert torch.equal(*ends)


def test_bf16_is_that_of_the_forwards() -> None:
    with accelerator(mixed_precision="bf16") as each:
        model = net()
        model, optimizer = each.prepare(model, RECIPES["AGZO"](model))
        for batch in loader(8):
            optimizer.step(lambda *batch: loss_of(model, *batch), *batch)
        weights = weights_of(model)
    model = net()
    optimizer = RECIPES["AGZO"](model)
    for x, y in loader(8):

        def closure(x: Any = x, y: Any = y) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            return torch.nn.functional.cross_entropy(logits.float(), y)

        optimizer.step(closure)
    assert torch.equal(weights, weights_of(model))
