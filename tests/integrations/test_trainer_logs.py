"""The log has the projected gradient, the length of a step and the number of forwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoext
from support.trainers import Ragged, arguments, logs, optimizer_of, tiny_llama, trained, weights
from zoext.integrations.transformers import ZOTrainer


def test_of_the_last_step(tmp_path: Path) -> None:
    model = tiny_llama()
    before = weights(model).clone()
    trainer = trained(tmp_path, model, max_steps=1, zo_options={"samples": 3})
    estimate = optimizer_of(trainer).last_estimate
    assert estimate is not None
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(float(estimate.loss))
    assert entry["projected_gradient"] == pytest.approx(float(estimate.coefficients.norm()))
    assert entry["forwards"] == 6
    assert "grad_norm" not in entry
    # Directions of n normals are nearly orthogonal, and about sqrt(n) long.
    moved = float((weights(model) - before).norm()) / before.numel() ** 0.5
    assert entry["step_length"] == pytest.approx(moved, rel=0.1)


def test_between_logs_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    norm = torch.linalg.vector_norm

    def counted(*args: object) -> torch.Tensor:
        reads.append(args)
        return norm(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.linalg, "vector_norm", counted)
    trainer = trained(tmp_path, max_steps=6, logging_steps=3)
    assert len(reads) == 2
    assert logs(trainer, "forwards") == [6, 12]


@pytest.mark.parametrize("update", [zoext.AdamReplay(horizon=2), zoext.SGD(normalized=True)])
def test_updates_that_rescale_the_estimate_have_no_length(update: zoext.Update, tmp_path: Path) -> None:
    model = tiny_llama()
    estimator = zoext.ForwardDifference(samples=2)
    optimizer = zoext.ZerothOrderOptimizer(model, estimator=estimator, update=update, lr=1e-3)
    trainer = ZOTrainer(model, arguments(tmp_path), train_dataset=Ragged(24), optimizers=(optimizer, None))
    trainer.train()
    assert len(logs(trainer, "projected_gradient")) == 3
    assert not logs(trainer, "step_length")
