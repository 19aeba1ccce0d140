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
from zoext import tasks
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
    trainer, metrics = trained_on_a_task(folder, per_device_train_batch_size=4, per_device_eval_batch_size=3)
    torch.save((weights(trainer), metrics), folder / f"task.{rank}.pt")
    check_that_weights_are_those_of_rank_0(rank, folder)
    check_that_separate_runs_are_refused(folder)


def trained_on_a_task(folder: Path, **options: Any) -> tuple[ZOTrainer, dict[str, float]]:
    """A trainer of examples with different numbers of predictions, and what it logs and finds."""
    ragged = Ragged(24)
    rows = [{name: tuple(each.tolist()) for name, each in ragged[index].items()} for index in range(24)]
    examples = [tasks.Example((tasks.Row(row["input_ids"], row["labels"]),)) for row in rows]
    trainer = ZOTrainer(
        tiny_llama(),
        arguments(folder, **options),
        train_dataset=examples,
        eval_dataset=examples[:7],
        objective=tasks.Answers(0, tasks.CAUSAL),
    )
    trainer.train()
    losses = {f"loss of step {step}": loss for step, loss in enumerate(logs(trainer, "loss"))}
    return trainer, {**losses, "eval_loss": trainer.evaluate()["eval_loss"]}


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
