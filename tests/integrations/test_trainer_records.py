"""What TrajectoryCallback records is replayed to the bits of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoext
from support.trainers import Ragged, arguments, tiny_llama, weights
from zoext.integrations.transformers import TrajectoryCallback, ZOTrainer


@pytest.mark.parametrize(
    ("recipe", "frames", "weight_decay"), [("MeZO", False, 0.0), ("MeZO", False, 0.1), ("AGZO", True, 0.0)]
)
def test_replayed(recipe: str, frames: bool, weight_decay: float, tmp_path: Path) -> None:
    model = tiny_llama(dropout=0.1)
    args = arguments(tmp_path, zo_optimizer=recipe, weight_decay=weight_decay, gradient_accumulation_steps=2)
    callback = TrajectoryCallback(tmp_path / "run.jsonl", frames=frames)
    ZOTrainer(model, args, train_dataset=Ragged(24), callbacks=[callback]).train()
    base = tiny_llama()
    assert zoext.replay(base, tmp_path / "run.jsonl").param_groups[0]["step"] == 3
    assert torch.equal(weights(base), weights(model))


def test_a_recording_that_is_opened_before_training(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = zoext.MeZO(model, lr=1e-2)
    with zoext.Trajectory(tmp_path / "run.jsonl", optimizer):
        ZOTrainer(model, arguments(tmp_path), train_dataset=Ragged(24), optimizers=(optimizer, None)).train()
    base = tiny_llama()
    assert zoext.replay(base, tmp_path / "run.jsonl").param_groups[0]["step"] == 3
    assert torch.equal(weights(base), weights(model))
