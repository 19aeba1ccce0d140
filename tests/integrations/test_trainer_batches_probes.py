"""ZOTrainer with probe="batched" takes the steps that it takes with streamed probes, up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import zoext
from support.tiny_language_models import tiny
from support.trainers import InOrder, arguments, logs, tiny_llama, weights
from zoext.integrations.transformers import ZOTrainer


def run(out: Path, probe: str, model: Any = None, kind: type[Trainer] = ZOTrainer, **options: Any) -> Trainer:
    settings = {"lr": 1e-3, "mu": 1e-2, "probe": probe, "estimator": zoext.CentralDifference(samples=2)}
    trainer = kind(
        model if model is not None else tiny_llama(),
        arguments(out, max_steps=3, **options),
        train_dataset=InOrder(48),
        optimizer_cls_and_kwargs=(zoext.LOZO, settings),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulating"])
def test_steps_are_those_of_streamed_probes(options: dict[str, Any], tmp_path: Path) -> None:
    found = {probe: run(tmp_path, probe, **options) for probe in ("batched", "streamed")}
    losses = [logs(found[probe], "loss") for probe in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(weights(found["batched"].model), weights(found["streamed"].model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_dropout_of_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(zoext.BatchedProbeError, match=r"model.eval\(\), or set its dropout to 0"):
        run(tmp_path, "batched", tiny("BERT"))


class OwnLoss(ZOTrainer):
    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        return super().compute_loss(model, inputs, *arguments, **options)


def test_losses_of_its_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"probe='batched' needs a loss for each copy.*probe='streamed'"):
        run(tmp_path, "batched", kind=OwnLoss)
    with pytest.raises(ValueError, match="zo_compact_loss"):
        run(tmp_path, "batched", zo_compact_loss=False)


def test_refusal_of_the_compact_loss_is_told(tmp_path: Path) -> None:
    model = tiny("Mixtral", output_router_logits=True)
    with (
        pytest.warns(UserWarning, match="the loss makes logits for all tokens"),
        pytest.raises(ValueError, match=r"models that it takes; .* adds the loss of the routers"),
    ):
        run(tmp_path, "batched", model)
