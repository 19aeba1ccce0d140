"""Runs of ZOTrainer on two processes: the cases of ``test_trainer_on_processes``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import distributed

import zoext
from support.ranks import join
from support.trainers import Ragged, arguments, logs, tiny_llama, trained, weights
from zoext.integrations.transformers import TrajectoryCallback, ZOTrainer

RANKS = 2
#: The arguments of each case; a single process takes batches of 8.
CASES: dict[str, dict[str, Any]] = {
    "MeZO": {"per_device_train_batch_size": 4},
    "MeZOGreedy": {"per_device_train_batch_size": 4, "zo_options": {"pool_size": 2}},
    "AdaMeZO": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def run(rank: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS)
    )
    AcceleratorState._reset_state(reset_partial_state=True)  # of earlier tests in the process that forked
    join(rank, RANKS, folder)
    for name, options in CASES.items():
        trainer = trained(folder, zo_optimizer=name, **options)
        assert trainer.accelerator.num_processes == RANKS
        assert trainer.model_wrapped is trainer.model  # no copies of gradients for DistributedDataParallel
        torch.save((weights(trainer), logs(trainer, "loss")), folder / f"{name}.{rank}.pt")
    check_that_weights_are_those_of_rank_0(rank, folder)
    check_that_separate_runs_are_refused(folder)


def check_that_weights_are_those_of_rank_0(rank: int, folder: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight += rank
    recorder = TrajectoryCallback(folder / "run.jsonl")
    ZOTrainer(model, arguments(folder), train_dataset=Ragged(24), callbacks=[recorder]).train()
    distributed.barrier()
    base = tiny_llama()
    zoext.replay(base, recorder.path)
    assert torch.equal(weights(base), weights(model))


def check_that_separate_runs_are_refused(folder: Path) -> None:
    model = tiny_llama()
    optimizer = zoext.MeZO(model, process_group=None)
    trainer = ZOTrainer(model, arguments(folder), train_dataset=Ragged(24), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="process_group=None lets each of the 2 processes train"):
        trainer.train()
    optimizer = zoext.MeZO(model, probe_group=distributed.group.WORLD)
    trainer = ZOTrainer(model, arguments(folder), train_dataset=Ragged(24), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"Trainer gives every process a batch of its own.*leave it out"):
        trainer.train()
