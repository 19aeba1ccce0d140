"""Runs on two ranks with a batch for each: the cases of ``test_replicas_take_the_same_step``."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn

import zoext
from support.graphed_runs import RECIPES
from support.ranks import Case, run_cases

RANKS = 2
#: Their directions depend on activations, which differ from rank to rank.
WATCHING = {"agzo", "adam over agzo"}
SETTINGS = {"lr": 3e-3, "mu": 1e-2, "weight_decay": 0.1, "seed": 5}


def model(seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def loss(net: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return net(torch.randn(6, 7, generator=generator)).square().mean()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def on_all_ranks(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(RANKS)]
    distributed.all_gather(found, tensor)
    return found


def check_alike(net: nn.Module) -> None:
    first, *others = on_all_ranks(flat(net))
    assert all(torch.equal(first, other) for other in others)


def check_moved(net: nn.Module) -> None:
    assert not torch.equal(flat(net), flat(model()))


def takes_the_step_of_both_batches(recipe: str, probe: str, rank: int) -> None:
    """To the bit, as one process does whose loss is the mean of the losses of both."""
    net, alone = model(), model()
    optimizer = RECIPES[recipe](net, probe=probe, **SETTINGS)
    plain = RECIPES[recipe](alone, probe=probe, process_group=None, **SETTINGS)
    for step in range(3):
        mine = optimizer.step(lambda step=step: loss(net, rank, step))
        of_both = plain.step(
            lambda step=step: (
                torch.stack([loss(alone, r, step).double() for r in range(RANKS)]).mean().float()
            )
        )
        if recipe not in WATCHING:
            assert torch.equal(mine, of_both)
    check_alike(net)
    check_moved(net)
    if recipe not in WATCHING:
        assert torch.equal(flat(net), flat(alone))


def micro_batches(reduction: str, rank: int) -> None:
    net, alone = model(), model()
    optimizer = zoext.MeZO(net, samples=2, reduction=reduction, **SETTINGS)
    plain = zoext.MeZO(alone, samples=2, process_group=None, **SETTINGS)
    divisor = 2 if reduction == "sum" else 1
    for step in range(2):
        optimizer.estimate(lambda step=step: loss(net, rank, step) / divisor)
    optimizer.step()
    plain.step(lambda: torch.stack([loss(alone, r, step) for r in range(RANKS) for step in range(2)]).mean())
    check_alike(net)
    torch.testing.assert_close(flat(net), flat(alone), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(optimizer.last_estimate.loss, plain.last_estimate.loss)


def asks_and_tells(rank: int) -> None:
    nets = [model(), model()]
    told, plain = (zoext.MeZOGreedy(net, pool_size=3, **SETTINGS) for net in nets)
    asked = told.ask()
    while asked is not None:
        losses = []
        for i in range(len(asked)):
            with asked.displaced(i):
                losses.append(loss(nets[0], rank, 0))
        asked = told.tell(losses)
    told.step()
    plain.step(lambda: loss(nets[1], rank, 0))
    assert torch.equal(flat(nets[0]), flat(nets[1]))
    check_alike(nets[0])


def sends_one_number_a_probe(rank: int) -> None:
    net = model()
    optimizer = zoext.MeZO(net, samples=3, **SETTINGS)
    optimizer.step(lambda: loss(net, rank, 0))  # with the comparison of the replicas
    sent: list[int] = []
    reduce = distributed.all_reduce

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **options)

    with mock.patch.object(distributed, "all_reduce", counted):
        optimizer.step(lambda: loss(net, rank, 1))
    assert sent == [(6 + 8) * 8]  # the losses of the round, and what tells ranks apart: 64 + 8 P bytes


def trains_alone_without_a_group(rank: int) -> None:
    net = model()
    zoext.MeZO(net, process_group=None, **SETTINGS).step(lambda: loss(net, rank, 0))
    first, other = on_all_ranks(flat(net))
    assert not torch.equal(first, other)


def trains_in_a_given_group(rank: int) -> None:
    own = distributed.new_group([rank], use_local_synchronization=True)
    net, alone = model(), model()
    zoext.MeZO(net, process_group=own, **SETTINGS).step(lambda: loss(net, rank, 0))
    zoext.MeZO(alone, process_group=None, **SETTINGS).step(lambda: loss(alone, rank, 0))
    assert torch.equal(flat(net), flat(alone))
    both = distributed.new_group([0, 1])
    optimizer = zoext.MeZO(net := model(), process_group=both, **SETTINGS)
    optimizer.step(lambda: loss(net, rank, 0))
    check_alike(net)
    twin_net, twin = copy.deepcopy((net, optimizer))  # a group cannot be copied
    for each, own_net in ((optimizer, net), (twin, twin_net)):
        each.step(lambda own_net=own_net: loss(own_net, rank, 1))
    assert torch.equal(flat(net), flat(twin_net))
    check_alike(net)


def refuses_a_group_of_others(rank: int) -> None:
    group = distributed.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="process_group: this rank is not one of its ranks"):
            zoext.MeZO(model(), process_group=group)


def names_the_rank_that_differs(rank: int) -> None:
    def begin(what: str) -> None:
        net = model(7 + (what == "weights") * rank)
        before = flat(net)
        settings = {**SETTINGS, **({} if what == "weights" else {what: SETTINGS[what] + rank})}
        message = (
            "different seeds"
            if what == "seed"
            else "rank 1 has (another recipe|other weights|other options).* at step 0"
        )
        with pytest.raises(RuntimeError, match=message):
            zoext.MeZO(net, **settings).step(lambda: loss(net, rank, 0))
        assert torch.equal(flat(net), before)

    for what in ("weights", "seed", "lr", "mu", "weight_decay"):
        begin(what)


def finds_a_rank_that_drifts(rank: int) -> None:
    net = model()
    optimizer = zoext.MeZO(net, **SETTINGS)

    def steps(numbers: range) -> None:
        for step in numbers:
            optimizer.step(lambda step=step: loss(net, rank, step % 5))

    steps(range(150))
    with torch.no_grad():
        net[0].bias[3] += 1e-3 * rank
    with pytest.raises(RuntimeError, match=r"rank 1 has other weights .* at step 200"):
        steps(range(150, 300))
    assert optimizer.param_groups[0]["step"] == 200


def finds_a_rank_that_left_out_a_step(rank: int) -> None:
    """As a loop does that goes on after an exception, on one rank only."""
    net = model()
    optimizer = zoext.MeZO(net, **SETTINGS)

    def take(step: int) -> None:
        optimizer.step(lambda: loss(net, rank, step))

    take(0)
    if rank == 0:
        optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": _advanced(optimizer)})
    with pytest.raises(RuntimeError, match=r"ranks are at different steps .*also after an exception"):
        take(1)


def _advanced(optimizer: zoext.ZerothOrderOptimizer) -> list[dict[str, Any]]:
    return [{**group, "step": group["step"] + 1} for group in optimizer.state_dict()["param_groups"]]


def lets_a_rank_begin_again(rank: int) -> None:
    """With an optimizer that was built anew, in the middle of a run."""
    net = model()
    optimizer = zoext.MeZO(net, **SETTINGS)
    for step in range(3):
        if rank == 1 and step == 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = zoext.MeZO(net, **SETTINGS)
            optimizer.load_state_dict(state)
        optimizer.step(lambda step=step: loss(net, rank, step))
    check_alike(net)


def handles_a_loss_that_is_nowhere_finite_alike(rank: int) -> None:
    """A loss that is not finite on one rank moves no rank."""
    for recipe in ("mezo", "greedy", "agzo"):
        net = model()
        optimizer = RECIPES[recipe](net, nonfinite="skip", **{**SETTINGS, "weight_decay": 0})
        optimizer.step(lambda net=net: loss(net, rank, 0) * (float("nan") if rank else 1))
        assert torch.equal(flat(net), flat(model()))
        assert optimizer.nonfinite_steps == 1
        optimizer.step(lambda net=net: loss(net, rank, 1))
        check_alike(net)
        check_moved(net)


def trains_a_ddp_module(rank: int) -> None:
    plain, inner = model(), model()
    wrapped = nn.parallel.DistributedDataParallel(inner)
    for net, given in ((plain, plain), (wrapped, wrapped), (wrapped, inner)):
        optimizer = zoext.MeZO(given, **SETTINGS)
        optimizer.step(lambda net=net: loss(net, rank, 0))
        if given is inner:
            zoext.MeZO(plain, **SETTINGS).step(lambda: loss(plain, rank, 0))
        assert torch.equal(flat(inner), flat(plain)) or given is plain
    assert all(parameter.grad is None for parameter in inner.parameters())


def refuses_fsdp1(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    for original in (True, False):
        sharded = FSDP(model(), device_id=torch.device("cpu"), use_orig_params=original)
        for given in (sharded, list(sharded.parameters())):
            with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*one whole replica"):
                zoext.MeZO(given)


CASES: dict[str, Case] = {
    f"both batches, {recipe}, {probe}": partial(takes_the_step_of_both_batches, recipe, probe)
    for recipe in RECIPES
    for probe in ("streamed", "inplace")
}
CASES |= {f"micro-batches, {kind}": partial(micro_batches, kind) for kind in ("mean", "sum")}
CASES |= {
    act.__name__: act
    for act in (
        asks_and_tells,
        sends_one_number_a_probe,
        trains_alone_without_a_group,
        trains_in_a_given_group,
        refuses_a_group_of_others,
        names_the_rank_that_differs,
        finds_a_rank_that_left_out_a_step,
        lets_a_rank_begin_again,
        finds_a_rank_that_drifts,
        handles_a_loss_that_is_nowhere_finite_alike,
        trains_a_ddp_module,
        refuses_fsdp1,
    )
}


if __name__ == "__main__":
    sys.exit(run_cases(CASES, RANKS))
