"""Batched probes of models that FSDP2 shards over ranks: the cases of their test."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import zoext
from support.batched_models import PLAIN, Problem, plain, problem
from support.oracle import bits
from support.ranks import Case, run_cases

RANKS = 2
SETTINGS: dict[str, Any] = {"lr": 1e-3, "mu": 1e-2, "seed": 3, "probe": "batched"}
DIRECTIONS = {"gaussian": zoext.Gaussian(), "lozo": zoext.LowRank(rank=2)}


def sharded(name: str, **options: Any) -> Problem:
    given = problem(name, **options)
    given.model.eval()
    if name in PLAIN:
        fully_shard(given.model.twice)
    else:
        for layer in given.model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer)
    fully_shard(given.model)
    return given


def whole(model: nn.Module) -> list[Tensor]:
    return [
        each.full_tensor() if hasattr(each, "full_tensor") else each for each in model.state_dict().values()
    ]


def steps_equal_those_of_one_process(name: str, direction: str, rank: int) -> None:
    given, alone = sharded(name), problem(name)
    alone.model.eval()
    options = {
        **SETTINGS,
        "direction": DIRECTIONS[direction],
        "estimator": zoext.CentralDifference(samples=2),
    }
    optimizers = (
        zoext.ZerothOrderOptimizer(given.model, **options),
        zoext.ZerothOrderOptimizer(alone.model, process_group=None, **options),
    )
    for _ in range(3):
        before = [bits(value) for value in whole(given.model)]
        estimates = [
            optimizer.estimate(its.losses) for optimizer, its in zip(optimizers, (given, alone), strict=True)
        ]
        torch.testing.assert_close(estimates[0].coefficients, estimates[1].coefficients, rtol=1e-6, atol=0)
        assert all(map(torch.equal, before, [bits(value) for value in whole(given.model)]))
        for optimizer in optimizers:
            optimizer.step()
        for one, other in zip(whole(given.model), whole(alone.model), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def trains_with_agzo_and_casts(rank: int) -> None:
    given = problem("Llama", torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in given.model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mp_policy=policy)
    fully_shard(given.model, mp_policy=policy)
    optimizer = zoext.AGZO(given.model, **SETTINGS)
    streamed = zoext.AGZO(given.model, **{**SETTINGS, "probe": "streamed"})
    one = optimizer.estimate(given.losses)
    other = streamed.estimate(lambda: given.losses(1)[0])
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-2, atol=0)


class ReadsItsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.child(x)) @ self.child.weight


def weights_that_are_read_elsewhere_are_refused(rank: int) -> None:
    torch.manual_seed(3)
    model = ReadsItsChild()
    fully_shard(model)
    x = torch.randn(4, 6)
    optimizer = zoext.MeZO(model, **SETTINGS)
    with pytest.raises(zoext.BatchedProbeError, match=r"child\.weight is read while the module"):
        optimizer.step(lambda copies: zoext.mean_per_copy(model(x.repeat(copies, 1)).square(), copies))


def tensor_parallel_weights_are_refused(rank: int) -> None:
    model, _ = plain(PLAIN["mixed"], train=False)
    mesh = init_device_mesh("cpu", (RANKS,))
    parallelize_module(model, mesh, {"twice": ColwiseParallel()})
    optimizer = zoext.MeZO(model, **SETTINGS)
    x = torch.zeros(2, 12, dtype=torch.float64)
    with pytest.raises(zoext.BatchedProbeError, match=r"twice\.weight is sharded while its module runs"):
        optimizer.step(lambda copies: zoext.mean_per_copy(model.twice(x.repeat(copies, 1)), copies))


CASES: dict[str, Case] = {
    **{
        f"{name}, {direction}": partial(steps_equal_those_of_one_process, name, direction)
        for name in ("mixed", "Llama")
        for direction in DIRECTIONS
    },
    "agzo": trains_with_agzo_and_casts,
    "reads": weights_that_are_read_elsewhere_are_refused,
    "tensor parallel": tensor_parallel_weights_are_refused,
}

if __name__ == "__main__":
    sys.exit(run_cases(CASES, RANKS))
