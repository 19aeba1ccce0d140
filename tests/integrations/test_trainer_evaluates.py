"""Evaluation, early stopping, the best model and compilation work as with a first-order trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import EarlyStoppingCallback

import zoext
from support.trainers import Ragged, Regression, arguments, logs, tiny_llama, trained, weights
from zoext.integrations.transformers import TrajectoryCallback, ZOTrainer


def test_the_best_model_is_loaded_and_training_stops(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        max_steps=12,
        learning_rate=0.5,  # far too large, so that the loss rises
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    recorder = TrajectoryCallback(tmp_path / "run.jsonl")
    callbacks: Any = [EarlyStoppingCallback(early_stopping_patience=2), recorder]
    trainer = ZOTrainer(
        tiny_llama(), args, train_dataset=Ragged(24), eval_dataset=Ragged(8), callbacks=callbacks
    )
    trainer.train()
    losses = logs(trainer, "eval_loss")
    assert 3 <= len(losses) < 12
    best = 1 + losses.index(min(losses))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))
    base = tiny_llama()
    zoext.replay(base, recorder.path, to_step=best)
    assert torch.equal(weights(base), weights(trainer))


def test_compiled_models_run_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: original(model, backend=counter))
    compiled = trained(tmp_path, Regression(), torch_compile=True, torch_compile_backend="eager")
    torch._dynamo.reset()
    assert counter.frame_count > 0
    assert torch.equal(weights(compiled), weights(trained(tmp_path, Regression())))
