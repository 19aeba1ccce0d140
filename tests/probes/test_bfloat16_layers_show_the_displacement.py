"""A bfloat16 layer adds all of AGZO's displacement in a batched probe; a displaced weight keeps a part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoext import ops

WIDTH, TOKENS, MU = 768, 256, 1e-3


def cosine(one: Tensor, other: Tensor) -> float:
    return float(nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), 0))


@pytest.mark.parametrize("leading", [0.0, 10.0], ids=["isotropic", "one leading direction"])
def test_cosine_with_the_wanted_displacement(leading: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = (normal(WIDTH, WIDTH) * 0.02).bfloat16()
    direction = nn.functional.normalize(normal(WIDTH), dim=0)
    inputs = (normal(TOKENS, WIDTH) + leading * normal(TOKENS, 1) * direction).bfloat16()
    basis, _ = ops.power_iteration(inputs, None, torch.tensor([3]), rank=1, iterations=3)
    left = normal(1, 1, WIDTH)
    displacement = MU * left[0].mT @ basis
    wanted = inputs.double() @ displacement.double().mT

    plain = nn.functional.linear(inputs, weight)
    displaced = nn.functional.linear(inputs, (weight.float() + displacement).bfloat16())
    factors = (left, basis.unsqueeze(0), torch.tensor([[MU]]))
    added, batched = torch.zeros(1, TOKENS, WIDTH, dtype=torch.bfloat16), plain.clone().unsqueeze(0)
    ops.factored_linear_(added, inputs.unsqueeze(0), *factors)
    ops.factored_linear_(batched, inputs.unsqueeze(0), *factors)

    assert cosine(added, wanted) > 0.9999
    shown = cosine(batched[0].double() - plain.double(), wanted)
    assert shown > cosine(displaced.double() - plain.double(), wanted) + 0.01
    assert shown > 0.95  # the rounding of the activations themselves
