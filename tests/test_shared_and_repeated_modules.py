"""Tied weights, modules that run twice, modules that call themselves: probed like the in-place way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoext


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.embedding = nn.Embedding(13, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(self.embedding(x)).tanh())


class CallsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(13, 5))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        y = self.weight[x].tanh()
        return y + self(x, depth - 1) * self.weight[0] if depth else y


class SharesWithItsParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(6, 6)
        self.weight = self.child.weight
        self.embedding = nn.Embedding(13, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(self.embedding(x))
        return y @ self.weight


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.recurrent = nn.LSTM(6, 4, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(self.embedding(x))[0]


@pytest.mark.parametrize("kind", [Tied, Twice, CallsItself, SharesWithItsParent, Recurrent])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_agrees_with_in_place(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = kind().to(dtype)
    x = torch.randint(0, 13, (4, 3))
    target = torch.randn_like(model(x))

    def closure() -> Tensor:
        return (model(x) - target).square().mean()

    streamed, inplace = (
        zoext.MeZO(model, mu=0.25, seed=5, probe=probe).estimate(closure) for probe in ("streamed", "inplace")
    )
    assert streamed.coefficients.abs() > 1e-3
    tolerance = 1e-4 if dtype == torch.float32 else 1e-6
    assert torch.allclose(streamed.coefficients, inplace.coefficients, rtol=tolerance, atol=1e-6)
    assert torch.allclose(streamed.loss, inplace.loss, rtol=tolerance, atol=1e-6)


def test_a_tied_weight_has_one_key_and_moves_once() -> None:
    torch.manual_seed(1)
    model = Tied()
    before = model.head.weight.detach().clone()
    optimizer = zoext.MeZO(model, lr=0.5, mu=0.1, seed=2)
    x = torch.randint(0, 13, (4, 3))
    optimizer.step(lambda: model(x).square().mean())
    assert optimizer.last_estimate is not None
    z = zoext.noise.normal((13, 6), seed=zoext.noise.step_seed(2, 0))
    assert torch.equal(model.embedding.weight, before + (optimizer.last_estimate.coefficients * -0.5) * z)
    assert model.embedding.weight is model.head.weight
