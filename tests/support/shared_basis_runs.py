"""Runs of AGZO on two ranks with a batch for each: the cases of ``test_agzo_sees_all_batches``."""

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
from support.ranks import Case, run_cases
from support.replicated_runs import RANKS, SETTINGS, check_alike, check_moved, flat, loss, model, on_all_ranks

ROWS = 37, 26
WIDTH = 40


def wide_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(WIDTH, 31), nn.GELU(), nn.Linear(31, 3))


def wide_batch(rank: int) -> Tensor:
    """Rows with a leading direction of their own, and one that leads in both batches together."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(ROWS[rank], WIDTH, generator=generator) / torch.arange(1, WIDTH + 1)
    x[:, 10 + rank] += 3.0 * torch.randn(ROWS[rank], generator=generator)
    x[:, 20] += 2.5 * torch.randn(ROWS[rank], generator=generator)
    return x


def basis_of(optimizer: zoext.ZerothOrderOptimizer) -> dict[int, Tensor]:
    return optimizer.engine.run.frame.frame.right


def finds_the_basis_of_both_batches(recipe_rank: int, rank: int) -> None:
    """That of the rows of all ranks: it captures what the exact leading subspace of them captures."""
    net = wide_model()
    optimizer = zoext.AGZO(net, rank=recipe_rank, **SETTINGS)
    optimizer.estimate(lambda: net(wide_batch(rank)).square().mean())
    seen = torch.cat([wide_batch(each) for each in range(RANKS)])
    for key, rows in ((0, seen), (2, net[:2](seen))):
        basis = basis_of(optimizer)[key]
        torch.testing.assert_close(basis @ basis.T, torch.eye(recipe_rank), rtol=0, atol=1e-5)
        first, other = on_all_ranks(basis)
        assert torch.equal(first, other)
        rows = rows.detach().double()
        captured = (rows @ basis.T.double()).square().sum()
        assert captured > 0.9999 * torch.linalg.svdvals(rows)[:recipe_rank].square().sum()
        if key == 0 and recipe_rank == 1:  # which is not that of either batch
            for part in rows.split(ROWS):
                assert (torch.linalg.svd(part).Vh[0] @ basis[0].double()).abs() < 0.9


def finds_the_exact_basis_of_narrow_layers(rank: int) -> None:
    """Sketches of layers with up to 2 rank + 6 inputs hold all that their activations tell."""
    net = model()
    optimizer = zoext.AGZO(net, rank=2, **SETTINGS)
    seen: dict[int, list[Tensor]] = {0: [], 2: [], 6: []}
    for key, module in ((0, net[0]), (2, net[2]), (6, net[4])):
        module.register_forward_pre_hook(lambda _, entering, key=key: seen[key].append(entering[0]))
    for each in range(RANKS):
        loss(net, each, 0)
    rows = {key: torch.cat(parts).detach().double() for key, parts in seen.items()}
    optimizer.estimate(lambda: loss(net, rank, 0))
    assert basis_of(optimizer).keys() == rows.keys()
    for key, basis in basis_of(optimizer).items():
        expected = torch.linalg.svd(rows[key]).Vh[:2]
        found = basis.double()
        torch.testing.assert_close(found.T @ found, expected.T @ expected, rtol=0, atol=1e-5)


def does_not_count_a_rank_without_data(rank: int) -> None:
    """Its loss has a weight of 0; its activations are stale, or not numbers."""
    nets = [wide_model(), wide_model()]
    optimizer, plain = (zoext.AGZO(net, rank=2, **SETTINGS) for net in nets)
    for filling in (7.0, torch.nan):
        x = (wide_batch(0), torch.full((4, WIDTH), filling))[rank]
        optimizer.estimate(lambda x=x: (nets[0](x).square().mean(), 5 * (1 - rank)))
        rows = x if rank == 0 else torch.zeros(0, WIDTH)  # an empty batch
        plain.estimate(lambda rows=rows: (nets[1](rows).square().sum(), 5 * (1 - rank)))
        for key, basis in basis_of(optimizer).items():
            assert torch.equal(basis, basis_of(plain)[key])
            assert basis.norm() > 1
        assert optimizer.step().isfinite()
        plain.step()
        nets[1].load_state_dict(nets[0].state_dict())
        check_alike(nets[0])


def discards_activations_that_are_not_finite_alike(rank: int) -> None:
    """Also if only the other rank has them, and its loss is finite."""

    def closure(net: nn.Module, is_bad: bool) -> Tensor:
        hidden = net(wide_batch(rank))
        if is_bad and rank == 1:
            net[2](torch.full((1, 31), torch.inf))
        return hidden.square().mean()

    net = wide_model()
    optimizer = zoext.AGZO(net, nonfinite="skip", **{**SETTINGS, "weight_decay": 0})
    optimizer.step(lambda: closure(net, True))
    assert torch.equal(flat(net), flat(wide_model()))
    assert optimizer.nonfinite_steps == 1
    optimizer.step(lambda: closure(net, False))
    check_alike(net)
    assert not torch.equal(flat(net), flat(wide_model()))


def gathers_in_portions(rank: int) -> None:
    """Large frames are gathered in several portions, with the same result."""
    nets = [wide_model(), wide_model()]
    sizes: list[int] = []
    gather = distributed.all_gather

    def counted(table: list[Tensor], own: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(own.numel())
        return gather(table, own, *args, **options)

    with mock.patch.object(distributed, "all_gather", counted):
        for net, at_once in zip(nets, (2**24, 2 * 8 * WIDTH), strict=True):
            with mock.patch("zoext.distributed._sketches._AT_ONCE", at_once):
                optimizer = zoext.AGZO(net, **SETTINGS)
                optimizer.step(lambda net=net: net(wide_batch(rank)).square().mean())
    assert sizes == [8 * (WIDTH + 31) + 1, 8 * WIDTH + 1, 8 * 31 + 1]
    assert torch.equal(flat(nets[0]), flat(nets[1]))
    check_alike(nets[0])


class Experts(nn.Module):
    """Each rank uses other experts, of a list and of a stack, and reads a weight in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
        self.stack = nn.Parameter(torch.randn(4, 5, 3))
        self.read = nn.Linear(3, 3)

    def forward(self, x: Tensor, rank: int) -> Tensor:
        out = nn.functional.linear(self.experts[rank](x), self.stack[1 + rank])
        weight = self.read.weight
        return out.square().mean() + (weight.square().mean() if rank else (x[:, :3] @ weight.T).mean())


def uses_experts_of_both_ranks(rank: int) -> None:
    """A weight has the directions that all its uses together give it: as if one process had both batches."""
    torch.manual_seed(3)
    net = Experts()
    alone = copy.deepcopy(net)
    x = [torch.randn(6, 4, generator=torch.Generator().manual_seed(each)) for each in range(RANKS)]
    for update in (zoext.SGD(), zoext.AdamReplay(horizon=2)):
        axes = {"direction": zoext.ActivationSubspace(rank=2, power_iterations=9), "update": update}
        optimizer = zoext.ZerothOrderOptimizer(net, **axes, **SETTINGS)
        plain = zoext.ZerothOrderOptimizer(alone, process_group=None, **axes, **SETTINGS)
        optimizer.estimate(lambda: net(x[rank], rank))
        plain.estimate(lambda: sum(alone(x[each], each) for each in range(RANKS)))
        frames = [each.engine.run.frame.frame for each in (optimizer, plain)]
        assert frames[0].unused == frames[1].unused
        assert len(frames[0].unused) == 1  # the third expert
        assert frames[0].right.keys() == frames[1].right.keys()
        for key, expected in frames[1].right.items():
            found = frames[0].right[key]
            torch.testing.assert_close(found.mT @ found, expected.mT @ expected, rtol=0, atol=1e-3)
            first, other = on_all_ranks(found)
            assert torch.equal(first, other)
        optimizer.step()
        for number in range(3):
            mine = (rank + number) % RANKS
            optimizer.step(lambda mine=mine: net(x[mine], mine))
        check_alike(net)
        alone.load_state_dict(net.state_dict())


class Sides(nn.Module):
    """A matrix that the ranks multiply from different sides, and one that only the first rank multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 4, 4))
        self.read = nn.Parameter(torch.randn(2, 4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, rank: int) -> Tensor:
        x = nn.functional.linear(x, self.stack[1]) if rank else x @ self.stack[1]
        x = x + self.read.mean() if rank else nn.functional.linear(x, self.read[0])
        return self.head(x).square().mean()


def resolves_conflicts_as_one_process(rank: int) -> None:
    torch.manual_seed(4)
    net = Sides()
    optimizer = zoext.AGZO(net, **SETTINGS)
    plain = zoext.AGZO(net, process_group=None, **SETTINGS)
    x = torch.randn(5, 4)
    optimizer.estimate(lambda: net(x, rank))
    plain.estimate(lambda: sum(net(x, each) for each in range(RANKS)))
    frames = [each.engine.run.frame.frame for each in (optimizer, plain)]
    keys = {name: number for number, (name, _) in enumerate(net.named_parameters())}
    for frame in frames:
        assert frame.kind(keys["stack"]) == "dense"
        assert frame.kind(keys["read"]) == frame.kind(keys["head.weight"]) == "right"
    optimizer.step()
    first, *others = on_all_ranks(flat(net))
    assert all(torch.equal(first, other) for other in others)


def finds_the_basis_on_one_rank_only(runs: int, rank: int) -> None:
    """Ranks that share out the probes of a round need not run the one that finds the basis."""
    net = model()
    optimizer = zoext.AGZO(net, rank=2, **SETTINGS)
    asked = optimizer.ask()
    losses = []
    for i in range(len(asked)):
        if rank == runs:
            with asked.displaced(i):
                loss(net, 0, 0)
        losses.append(1.0)
    asked = optimizer.tell(losses)
    while asked is not None:
        asked = optimizer.tell([0.5 + 0.1 * i for i in range(len(asked))])
    optimizer.step()
    check_alike(net)
    check_moved(net)


def asks_for_the_forward_that_no_rank_ran(rank: int) -> None:
    net = model()
    optimizer = zoext.AGZO(net, **SETTINGS)
    asked = optimizer.ask()
    with pytest.raises(RuntimeError, match=r"tell: ActivationSubspace finds its basis in a forward at theta"):
        optimizer.tell([1.0])
    with asked.displaced(0):
        loss(net, rank, 0)
    asked = optimizer.tell([1.0])
    assert optimizer.tell([1.2]) is None
    optimizer.step()
    check_alike(net)
    check_moved(net)


CASES: dict[str, Case] = {
    f"both batches, rank {rank}": partial(finds_the_basis_of_both_batches, rank) for rank in (1, 3)
}
CASES |= {f"forward on rank {rank}": partial(finds_the_basis_on_one_rank_only, rank) for rank in (0, 1)}
CASES |= {
    act.__name__: act
    for act in (
        finds_the_exact_basis_of_narrow_layers,
        does_not_count_a_rank_without_data,
        discards_activations_that_are_not_finite_alike,
        gathers_in_portions,
        uses_experts_of_both_ranks,
        resolves_conflicts_as_one_process,
        asks_for_the_forward_that_no_rank_ran,
    )
}


if __name__ == "__main__":
    sys.exit(run_cases(CASES, RANKS))
