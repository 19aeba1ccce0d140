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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hooked", [False, True])
def test_rows_that_an_embedding_reads_have_the_bits_of_the_whole_table(
    dtype: torch.dtype, hooked: bool
) -> None:
    """The first probe displaces the whole table, later ones only the rows that are read."""
    torch.manual_seed(1)
    model = nn.Embedding(500, 13).to(dtype)
    seen = []
    if hooked:  # a hook may read the table: then it must be displaced as a whole
        model.register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    index = torch.tensor([[3, 499, 0], [3, 17, 17]])
    before = model.weight.detach().clone()
    outputs: list[Tensor] = []

    def closure() -> Tensor:
        outputs.append(model(index))
        return outputs[-1].float().sum()

    optimizer = zoext.MeZO(model, mu=0.25, seed=5)
    for _ in range(2):
        optimizer.estimate(closure)
    z = zoext.noise.normal((500, 13), seed=zoext.noise.step_seed(5, 0))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for position, output in enumerate(outputs):
        table = (before.to(wide) + (0.25 - position % 2 * 0.5) * z.to(wide)).to(dtype)
        assert torch.equal(output, table[index])
        if hooked:
            assert torch.equal(seen[position], table)
    assert len(outputs) == 4
    assert torch.equal(model.weight, before)
