"""Beyond a forward of its copies, a batched probe allocates factors, or copies of a module at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.allocations import peak_of
from zoext.probes._batched import displacements

KIB = 2**10


def model_of(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [
        nn.Embedding(2048, 256),
        nn.Linear(256, 1024),
        nn.Linear(1024, 512),
        nn.Linear(512, 640, bias=False),
    ]
    return nn.Sequential(*layers).to(dtype)


def extra(optimizer: zoext.ZerothOrderOptimizer, model: nn.Module, copies: int) -> int:
    """Bytes of an estimate beyond those of a forward of ``copies``."""
    index = torch.arange(3)

    def closure(copies: int) -> Tensor:
        return zoext.mean_per_copy(model(index.repeat(copies)).float().square().mean(1), copies)

    def plain() -> None:
        with torch.no_grad():
            closure(copies)

    optimizer.estimate(closure)  # which checks
    return peak_of(lambda: optimizer.estimate(closure)) - peak_of(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("draws", "rank"), [(1, 2), (3, 4)])
def test_factors_alone(dtype: torch.dtype, draws: int, rank: int) -> None:
    model = model_of(dtype)
    estimator = zoext.CentralDifference(samples=draws)
    optimizer = zoext.LOZO(model, rank=rank, estimator=estimator, probe="batched")
    sides = [(len(layer.weight), layer.weight[0].numel()) for layer in model]
    factors = 4 * rank * sum(draws * rows + columns for rows, columns in sides)
    vectors = 2 * draws * sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 1)
    smallest = min(layer.weight.numel() * layer.weight.element_size() for layer in model)
    found = extra(optimizer, model, 2 * draws)
    assert found <= factors + vectors + 64 * KIB
    assert factors + vectors + 64 * KIB < smallest  # so that one displaced weight would be seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_the_largest_module(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    optimizer = zoext.MeZO(model, probe="batched")
    weights = [layer.weight.numel() * layer.weight.element_size() for layer in model]
    found = extra(optimizer, model, 2)
    assert found <= 2 * max(weights) + 128 * KIB
    assert found > 2 * max(weights[1:]) - 128 * KIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_piece_of_a_large_linear_layer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 128 * KIB
    monkeypatch.setitem(displacements.PIECE, "cpu", piece)
    model = model_of(dtype)
    model[0].requires_grad_(False)  # a table is not multiplied
    optimizer = zoext.MeZO(model, probe="batched")
    smallest = min(layer.weight.numel() * layer.weight.element_size() for layer in model[1:])
    found = extra(optimizer, model, 2)
    assert found <= piece + 64 * KIB
    assert piece + 64 * KIB < smallest
