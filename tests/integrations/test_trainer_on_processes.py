"""Two processes with half of a batch each take the step of one process with the batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from support.ranks import fork
from support.replicated_trainers import CASES, RANKS, run, trained_on_a_task
from support.trainers import logs, tiny_llama, trained, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of both processes; what is not compared here has been checked in them."""
    folder = tmp_path_factory.mktemp("processes")
    assert (
        fork(RANKS, partial(run, folder=folder)) == 0
    )  # a new interpreter would take as long as all tests here
    return folder


@pytest.mark.parametrize("case", CASES)
def test_step_of_the_whole_batch(case: str, folder: Path, tmp_path: Path) -> None:
    (end, losses), (other, its) = (torch.load(folder / f"{case}.{rank}.pt") for rank in range(RANKS))
    assert torch.equal(end, other)
    assert losses == its
    options = {
        **CASES[case],
        "zo_optimizer": case,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    }
    alone = trained(tmp_path, **options)
    assert losses == pytest.approx(logs(alone, "loss"), rel=1e-5)
    moved = (weights(alone) - weights(tiny_llama())).norm()
    assert (weights(alone) - end).norm() < 1e-2 * moved


def test_the_objective_of_a_task(folder: Path, tmp_path: Path) -> None:
    """Each process has its weight: the number of its predictions."""
    (end, found), (other, its) = (torch.load(folder / f"task.{rank}.pt") for rank in range(RANKS))
    assert torch.equal(end, other)
    assert found == its
    alone, wanted = trained_on_a_task(tmp_path, per_device_train_batch_size=8)
    assert found == pytest.approx(wanted, rel=1e-5)
    moved = (weights(alone) - weights(tiny_llama())).norm()
    assert (weights(alone) - end).norm() < 1e-2 * moved
