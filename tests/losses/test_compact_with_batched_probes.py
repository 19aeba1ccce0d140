"""The models that docs/batched.md lists have the slopes of streamed probes with batched ones, as it says."""

from __future__ import annotations

from typing import Any

import pytest

import zoext
from support.tiny_language_models import MODELS, ragged, tiny

#: Refused as they are: relative positions whose table cannot be read for each example.
FROZEN = dict.fromkeys(("T5", "T5, untied", "mT5"), "relative_attention_bias")


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


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FROZEN])
def test_models_run_as_they_are(name: str) -> None:
    assert_equal(name, None, ragged())


@pytest.mark.parametrize("name", FROZEN)
def test_models_run_with_frozen_positions(name: str) -> None:
    assert_equal(name, FROZEN[name], ragged())
