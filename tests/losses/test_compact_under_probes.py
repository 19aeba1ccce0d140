"""Probes displace what the compact loss runs, so that steps with it are those with the loss of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoext
from support.tiny_language_models import ragged, tiny

RECIPES = {
    "MeZO": lambda model, **options: zoext.MeZO(model, lr=1e-2, mu=1e-2, **options),
    "AGZO": lambda model, **options: zoext.AGZO(model, lr=1e-2, mu=1e-2, **options),
    "LOZO": lambda model, **options: zoext.LOZO(model, lr=1e-2, mu=1e-2, **options),
}


def weights_after(model: Any, optimizer: Any, loss: Any) -> Tensor:
    for _ in range(3):
        optimizer.step(lambda: loss(ragged()))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "BERT", "T5"])
def test_steps_are_those_of_the_full_loss(name: str, probe: str) -> None:
    model, other = tiny(name, scale=3.0), tiny(name, scale=3.0)
    optimizers = [RECIPES["MeZO"](each, probe=probe) for each in (model, other)]
    got = weights_after(model, optimizers[0], zoext.CompactLoss(model, chunk=4))
    want = weights_after(other, optimizers[1], lambda batch: other(**batch).loss)
    start = torch.cat([parameter.detach().flatten() for parameter in tiny(name, scale=3.0).parameters()])
    assert (want - start).norm() > 1e-3
    assert (got - want).norm() < 1e-2 * (want - start).norm()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["Llama, tied", "Llama"])
def test_streamed_probes_displace_the_head(name: str, recipe: str) -> None:
    """As they displace it in the forward of the whole model."""
    model = tiny(name, scale=3.0)
    loss = zoext.CompactLoss(model, chunk=4)
    optimizer = RECIPES[recipe](model, probe="streamed")
    got: list[Tensor] = []
    want: list[Tensor] = []

    def closure() -> Tensor:
        got.append(loss(ragged()))
        want.append(model(**ragged()).loss)
        return got[-1]

    before = [parameter.clone() for parameter in model.parameters()]
    optimizer.estimate(closure)
    assert len(set(map(float, got))) > 1
    torch.testing.assert_close(torch.stack(got), torch.stack(want))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_head_moves_the_loss() -> None:
    """Only the head is trained: a probe that missed it would find no slope."""
    model = tiny("Llama", scale=3.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    loss = zoext.CompactLoss(model)
    estimate = zoext.MeZO(model, lr=1e-2, mu=1e-2, probe="streamed").estimate(lambda: loss(ragged()))
    assert float(estimate.coefficients.abs().sum()) > 1e-3
