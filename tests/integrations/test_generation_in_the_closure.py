"""A closure may generate text: with every kind of cache, streamed probes give the slopes of in-place ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zoext
from support.peft_methods import TOKENS, llama, snapshot

KINDS = {
    "cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 2},
}


def score_of(model: Any, options: dict[str, Any]) -> Callable[[], Tensor]:
    """How sure the model is of the tokens that it samples: it depends on all of their forwards."""

    def closure() -> Tensor:
        torch.manual_seed(0)
        out = model.generate(
            TOKENS[:, :6],
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        return -torch.stack(out.scores).log_softmax(-1).amax(-1).mean()

    return closure


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("kind", KINDS)
def test_slopes(kind: str) -> None:
    slopes = []
    for probe in ("streamed", "inplace"):
        torch.manual_seed(0)
        model = llama(use_cache=True).double().eval()
        before = snapshot(model)
        optimizer = zoext.MeZO(model, mu=1e-3, probe=probe)
        closure = score_of(model, KINDS[kind])
        slopes.append([float(optimizer.estimate(closure).coefficients) for _ in range(3)])
        if probe == "streamed":
            after = snapshot(model)
            assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert slopes[0][0] != 0
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4)
