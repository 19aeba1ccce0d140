"""Small models of layers of several kinds, to add side paths to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import zoext


class Packed(nn.Module):
    """A linear layer with weights of 8 bits, which are a buffer; packed layers of libraries look alike."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        self.register_buffer("packed", weight)
        self.register_buffer("scale", torch.tensor(0.5 / 127))

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self.packed.to(dtype) * self.scale.to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight(input.dtype))


class Model(nn.Module):
    """Examples [B, T, 7], a mask [B, T], and a logit of five classes each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.packed = Packed(11, 9)
        self.head = nn.Linear(9, 5, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.packed(input=torch.tanh(self.first(x))))
        return self.head(h).mean(1)


X = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 3, 1, 4])


def model(dtype: torch.dtype = torch.float32) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Model().to(dtype)


def losses(model: Any, copies: int = 1) -> Tensor:
    """The losses [copies] of the batch."""
    dtype = model.head.weight.dtype
    logits = model(zoext.repeat(X.to(dtype), copies))
    each = functional.cross_entropy(logits, zoext.repeat(LABELS, copies), reduction="none")
    return zoext.mean_per_copy(each, copies)


def loss(model: Any) -> Tensor:
    return losses(model)[0]


def filled(paths: dict[str, zoext.SidePath], seed: int = 9) -> None:
    """Gives B of each path values other than zero."""
    for key, path in enumerate(paths.values()):
        weight = path.up.weight
        weight.data.copy_(0.3 * zoext.noise.normal(weight.shape, seed=seed, key=key))
