"""A run that is resumed from a checkpoint leaves the bits of one that was not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import zoext
from support.trainers import Ragged, arguments, logs, optimizer_of, tiny_llama, weights
from zoext.integrations.transformers import TrajectoryCallback, ZOTrainer

STEPS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 3,
    "lr_scheduler_type": "cosine",
    "gradient_accumulation_steps": 2,
}


class Interrupt(TrainerCallback):
    """Raises in the step after the checkpoint."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def trainer_of(model: torch.nn.Module, out: Path, *callbacks: TrainerCallback, **options: Any) -> ZOTrainer:
    args = arguments(out, **{**STEPS, **options})
    return ZOTrainer(model, args, train_dataset=Ragged(20), callbacks=list(callbacks))


def assert_same_state(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for each, other in zip(a, b, strict=True):
            assert_same_state(each, other)
    else:
        assert a == b


CASES = {
    "MeZO": {"weight_decay": 0.1},
    "AdaMeZO": {"zo_options": {"horizon": 4}},
    "LOZO": {"zo_options": {"refresh_interval": 3, "precision": "residual"}},
}


@pytest.mark.parametrize("recipe", CASES)
def test_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    options = {"zo_optimizer": recipe, **CASES[recipe]}
    dtype = torch.bfloat16 if recipe == "LOZO" else torch.float32
    whole, again = (tiny_llama(dtype, dropout=0.2) for _ in range(2))
    straight = trainer_of(whole, tmp_path / "straight", **options)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(again, tmp_path / "cut", Interrupt(), **options).train()
    resumed = trainer_of(tiny_llama(dtype, dropout=0.2), tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(straight))
    assert not torch.equal(weights(resumed), weights(tiny_llama(dtype)))
    assert_same_state(optimizer_of(resumed).state_dict(), optimizer_of(straight).state_dict())
    assert logs(resumed, "projected_gradient") == logs(straight, "projected_gradient")
    assert logs(resumed, "forwards") == logs(straight, "forwards") == [6, 12]


def test_the_recording_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    recorder = TrajectoryCallback(path, notes={"task": "test"})
    options = {"zo_optimizer": "AdaMeZO"}
    trainer = trainer_of(tiny_llama(), tmp_path / "cut", recorder, Interrupt(), **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert recorder.trajectory is None
    assert optimizer_of(trainer).recorder is None
    trainer.remove_callback(Interrupt)
    trainer.train(resume_from_checkpoint=True)
    base = tiny_llama()
    assert zoext.replay(base, path).param_groups[0]["step"] == 6
    assert torch.equal(weights(base), weights(trainer))


def test_a_file_of_another_run_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        trainer_of(tiny_llama(), tmp_path, TrajectoryCallback(path)).train()
    assert path.read_text() == "mine"
