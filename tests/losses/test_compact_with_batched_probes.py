"""The models that docs/batched.md lists have the slopes of streamed probes with batched ones, as it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoext
from support.tiny_language_models import MODELS, ragged, tiny

#: Refused as they are: positions that all examples share, unless the batch has them or they are frozen.
WITH_POSITIONS = {"GPT-2", "BERT", "DistilBERT", "ALBERT", "ELECTRA"}
FROZEN = {
    "T5": "relative_attention_bias",
    "T5, untied": "relative_attention_bias",
    "mT5": "relative_attention_bias",
    "BART": "embed_positions",
    "GPT-2": "wpe",
    "BERT": "position_embeddings",
}


def slope(name: str, probe: str, frozen: str | None, batch: dict[str, Any]) -> float:
    model = tiny(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(frozen is None or frozen not in key)
    loss = zoext.CompactLoss(model)
    optimizer = zoext.LOZO(model, mu=1e-2, probe=probe)
    if probe == "batched":
        estimate = optimizer.estimate(lambda copies: loss(zoext.repeat(batch, copies), copies))
    else:
        estimate = optimizer.estimate(lambda: loss(batch))
    return float(estimate.coefficients)


def assert_equal(name: str, frozen: str | None, batch: dict[str, Any]) -> None:
    got, want = (slope(name, probe, frozen, batch) for probe in ("batched", "streamed"))
    assert want != 0
    assert got == pytest.approx(want, rel=1e-3, abs=2e-3)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITH_POSITIONS | FROZEN.keys()])
def test_models_run_as_they_are(name: str) -> None:
    assert_equal(name, None, ragged())


@pytest.mark.parametrize("name", sorted(WITH_POSITIONS))
def test_models_run_with_positions_in_the_batch(name: str) -> None:
    assert_equal(name, None, {**ragged(), "position_ids": torch.arange(9).repeat(3, 1)})


@pytest.mark.parametrize("name", FROZEN)
def test_models_run_with_frozen_positions(name: str) -> None:
    assert_equal(name, FROZEN[name], ragged())
