"""Operators that take functions, such as ``flex_attention``, run in watched probes too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import zoext


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.slope = nn.Linear(16, 16), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inner(x).view(1, 1, 4, 16)
        bias = self.slope * torch.arange(4.0)
        return flex_attention(heads, heads, heads, lambda score, b, h, q, k: score + bias[k])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_slopes_are_right_with_either_probe() -> None:
    slopes = []
    for probe in ("streamed", "inplace"):
        torch.manual_seed(0)
        model = Attention()
        optimizer = zoext.MeZO(model, lr=0.0, mu=1e-2, seed=3, probe=probe)
        for _ in range(2):
            optimizer.step(lambda model=model: model(torch.linspace(-1, 1, 64).view(4, 16)).square().mean())
        assert optimizer.last_estimate is not None
        slopes.append(float(optimizer.last_estimate.coefficients))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)
    assert slopes[0] != 0
