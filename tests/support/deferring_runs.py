"""Runs of ``LowRank(defer=True)`` on two ranks: the cases of ``test_deferred_steps_on_ranks``."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import zoext
from support.ranks import Case, run_cases

RANKS, INTERVAL, STEPS = 2, 4, 11


def model() -> nn.Module:
    torch.manual_seed(7)
    layers = nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 5), nn.LayerNorm(5), nn.Linear(5, 3)
    return nn.Sequential(*layers).bfloat16()


def loss(net: nn.Module, batch: int) -> Tensor:
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(batch))
    return net(x.bfloat16()).float().square().mean()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).float()


def check_alike(net: nn.Module) -> None:
    found = [torch.empty_like(flat(net)) for _ in range(RANKS)]
    distributed.all_gather(found, flat(net))
    assert all(torch.equal(found[0], other) for other in found)


def optimizer_of(net: nn.Module, kind: str) -> zoext.ZerothOrderOptimizer:
    world = distributed.group.WORLD
    groups = {
        "alone": {"process_group": None},
        "data": {"process_group": world},
        "probes": {"process_group": None, "probe_group": world},
    }[kind]
    direction = zoext.LowRank(rank=2, refresh_interval=INTERVAL, defer=True)
    estimator = zoext.CentralDifference(samples=2)
    return zoext.ZerothOrderOptimizer(
        net, lr=3e-3, mu=1e-2, seed=5, direction=direction, estimator=estimator, **groups
    )


def take(net: nn.Module, optimizer: zoext.ZerothOrderOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.step(lambda step=step: loss(net, step))


def equals_one_process(kind: str, rank: int) -> None:
    """With the same batch on all ranks, and evaluations by all ranks within an interval."""
    runs: list[Any] = [(net, optimizer_of(net, each)) for each in (kind, "alone") for net in [model()]]
    for net, optimizer in runs:
        take(net, optimizer, range(6))
        loss(net, 99)
        take(net, optimizer, range(6, STEPS))
        optimizer.merge()
    check_alike(runs[0][0])
    assert torch.equal(flat(runs[0][0]), flat(runs[1][0]))
    assert not torch.equal(flat(runs[0][0]), flat(model()))


def takes_the_step_of_other_batches(rank: int) -> None:
    net = model()
    optimizer = optimizer_of(net, "data")
    for step in range(STEPS):
        optimizer.step(lambda step=step: loss(net, 2 * step + rank))
    optimizer.merge()
    check_alike(net)


def a_rank_that_looks_alone_is_found(kind: str, rank: int) -> None:
    """At once, before a weight moves; after a checkpoint was loaded on all ranks they go on."""
    net = model()
    optimizer = optimizer_of(net, kind)
    take(net, optimizer, range(2))
    optimizer.merge()
    saved = [{name: value.clone() for name, value in net.state_dict().items()}, optimizer.state_dict()]
    take(net, optimizer, range(2, 3))
    if rank == 1:
        net.state_dict()
    before = flat(net)
    with pytest.raises(
        RuntimeError, match=r"With defer=True, have all ranks call optimizer\.merge\(\) before"
    ):
        take(net, optimizer, range(3, 4))
    assert torch.equal(flat(net), before)
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    take(net, optimizer, range(2, STEPS))
    optimizer.merge()
    check_alike(net)


def a_rank_that_looks_between_an_estimate_and_its_step_is_found(rank: int) -> None:
    net = model()
    optimizer = optimizer_of(net, "data")
    take(net, optimizer, range(INTERVAL - 1))
    optimizer.estimate(lambda: loss(net, 3))
    if rank == 0:
        net(torch.zeros(2, 7).bfloat16())
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"optimizer\.merge\(\) before"):
        take(net, optimizer, range(INTERVAL, INTERVAL + 1))


def a_rank_may_look_alone_where_that_changes_nothing(rank: int) -> None:
    """After a merge on all ranks, and at the end of an interval."""
    net = model()
    optimizer = optimizer_of(net, "data")
    take(net, optimizer, range(2))
    optimizer.merge()
    if rank == 0:
        net.state_dict()
    take(net, optimizer, range(2, INTERVAL))
    if rank == 1:
        loss(net, 99)
    take(net, optimizer, range(INTERVAL, STEPS))
    optimizer.merge()
    check_alike(net)


def is_recorded_by_the_first_rank(collective: bool, rank: int) -> None:
    """Also from a checkpoint in the middle of an interval, on one rank alone or by all of them."""
    names = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(names)
    path = Path(str(names[0])) / "run.jsonl"
    net = model()
    optimizer = optimizer_of(net, "data")

    def recording(**options: Any) -> Any:
        return zoext.Trajectory(path, optimizer, collective=collective, **options)

    records = collective or rank == 0
    trajectory = recording() if records else None
    take(net, optimizer, range(6))
    if trajectory is not None:
        trajectory.close()
    optimizer.merge()
    saved = [{name: value.clone() for name, value in net.state_dict().items()}, optimizer.state_dict()]
    net = model()
    optimizer = optimizer_of(net, "data")
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    trajectory = recording(resume=True) if records else None
    take(net, optimizer, range(6, STEPS))
    if trajectory is not None:
        trajectory.close()
    distributed.barrier()
    fresh = model()
    zoext.replay(fresh, path)
    optimizer.merge()
    assert torch.equal(flat(fresh), flat(net))
    check_alike(net)


def shards_are_refused(rank: int) -> None:
    net = nn.Linear(4, 6)
    mesh = init_device_mesh("cpu", (RANKS,))
    net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"params: there are DTensors, and defer=True holds back"):
        optimizer_of(net, "data")


CASES: dict[str, Case] = {
    f"one process, {kind}": partial(equals_one_process, kind) for kind in ("data", "probes")
}
CASES |= {
    f"looks alone, {kind}": partial(a_rank_that_looks_alone_is_found, kind) for kind in ("data", "probes")
}
CASES |= {
    f"recorded, collective={collective}": partial(is_recorded_by_the_first_rank, collective)
    for collective in (True, False)
}
CASES |= {
    act.__name__: act
    for act in (
        shards_are_refused,
        takes_the_step_of_other_batches,
        a_rank_that_looks_between_an_estimate_and_its_step_is_found,
        a_rank_may_look_alone_where_that_changes_nothing,
    )
}

if __name__ == "__main__":
    sys.exit(run_cases(CASES, RANKS))
