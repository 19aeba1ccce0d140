"""Two processes of Accelerate take the step of all their batches, and keep the same weights."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

import zoext
from support.accelerate_loops import RECIPES, accelerator, loss_of, net, plain_run, weights_of
from support.accelerate_loops import loader as loader_of
from support.ranks import fork


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(("recipe", "size"), [("MeZOGV", 2)])
def test_two_processes_are_one_large_batch(recipe: str, size: int, tmp_path: Path) -> None:
    port = free_port()

    def act(rank: int) -> None:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="localhost")
        with accelerator(gradient_accumulation_steps=4 // size) as each:
            model = net()
            dealt = zoext.MeZO(model, probe_group=torch.distributed.group.WORLD)
            with pytest.raises(
                ValueError, match="probe_group: Accelerate gives every process a batch of its own"
            ):
                each.prepare(dealt)
            if rank:
                torch.nn.init.zeros_(model[0].weight)  # prepare gives it the weights of rank 0
            model, optimizer, data = each.prepare(model, RECIPES[recipe](model), loader_of(size))
            assert type(model).__name__ == "Sequential"
            losses = []
            for batch in data:
                with each.accumulate(model):
                    loss = optimizer.step(lambda *batch: loss_of(model, *batch), *batch)
                    each.clip_grad_norm_(model.parameters(), 0.1)
                losses += [] if loss is None else [loss.item()]
            torch.save((weights_of(model), losses), tmp_path / f"{rank}.pt")

    assert fork(2, act) == 0
    (first, losses), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    _, known = plain_run(lambda model: RECIPES[recipe](model), epochs=1)
    torch.testing.assert_close(losses[:2], known[:2], rtol=1e-5, atol=1e-6)
