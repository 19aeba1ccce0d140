"""Runs whose probes are dealt out over ranks, or whose losses have weights: the cases of its test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zoext
from support.graphed_runs import RECIPES
from support.ranks import Case, first, run_cases
from zoext.distributed import Ranks

RANKS, STEPS = 4, 6  # steps: twice as many as the longest window and refresh interval of a recipe
SETTINGS = {"lr": 3e-3, "mu": 1e-2, "weight_decay": 0.1, "seed": 5}


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Dropout(0.2), nn.Linear(11, 5), nn.Linear(5, 3))


def loss(net: nn.Module, batch: int, rows: int = 6) -> Tensor:
    x = torch.randn(rows, 7, generator=torch.Generator().manual_seed(batch))
    return net(x).square().mean()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def check_alike(net: nn.Module, group: Any = None) -> None:
    found = [torch.empty_like(flat(net)) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(found, flat(net), group=group)
    assert all(torch.equal(found[0], other) for other in found)


#: By recipe: weights after a run on one process and torch's generator, and weights after one on two batches.
ALONE: dict[str, tuple[Tensor, Tensor]] = {}
ON_BOTH: dict[str, Tensor] = {}


def run_alone() -> None:
    for recipe, build in RECIPES.items():
        net = model()
        optimizer = build(net, process_group=None, **SETTINGS)
        torch.manual_seed(3)
        for step in range(STEPS):
            optimizer.step(lambda net=net, step=step: loss(net, step))
        ALONE[recipe] = flat(net), torch.get_rng_state()
        if "agzo" in recipe:  # whose ranks find the subspace of both batches
            continue
        net = model().eval()
        optimizer = build(net, process_group=None, **SETTINGS)
        for step in range(STEPS):
            optimizer.step(
                lambda net=net, step=step: (
                    torch.stack([loss(net, 2 * step + each).double() for each in range(2)]).mean().float()
                )
            )
        ON_BOTH[recipe] = flat(net)


@cache
def of_data_and_probes() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "probe"))


def equals_one_process(kind: str, size: int, recipe: str, rank: int) -> None:
    """To the bit, also the generators that dropout reads; data-parallel ranks have equal batches."""
    group = first(size)
    if rank >= size:
        return
    net = model()
    groups = {"process_group": None, "probe_group": group} if kind == "probes" else {"process_group": group}
    optimizer = RECIPES[recipe](net, **groups, **SETTINGS)
    torch.manual_seed(3)
    for step in range(STEPS):
        optimizer.step(lambda step=step: loss(net, step))
    weights, state = ALONE[recipe]
    assert torch.equal(flat(net), weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(weights, flat(model()))


def equals_one_process_on_both_batches(recipe: str, rank: int) -> None:
    """A mesh of two ranks with batches of their own, and two that share their probes."""
    mesh = of_data_and_probes()
    mine = mesh.get_local_rank("data")
    net = model().eval()
    dealt = RECIPES[recipe](net, process_group=mesh, **SETTINGS)
    for step in range(STEPS):
        dealt.step(lambda step=step: loss(net, 2 * step + mine))
    assert torch.equal(flat(net), ON_BOTH[recipe])
    check_alike(net)


def equals_two_ranks_without_dealt_probes(recipe: str, rank: int) -> None:
    """To the bit: directions that depend on activations follow from both batches."""
    mesh = of_data_and_probes()
    mine = mesh.get_local_rank("data")
    net, plain_net = model().eval(), model().eval()
    dealt = RECIPES[recipe](net, process_group=mesh, **SETTINGS)
    plain = RECIPES[recipe](plain_net, process_group=mesh["data"], **SETTINGS)
    for step in range(STEPS):
        for optimizer, its in ((dealt, net), (plain, plain_net)):
            optimizer.step(lambda its=its, step=step: loss(its, 2 * step + mine))
    assert torch.equal(flat(net), flat(plain_net))
    check_alike(net)


def evaluates_a_share(rank: int) -> None:
    """The calls of each rank: those of one process, divided, and one more where batches are compared."""
    for pool, expected in ((8, [2, 2, 2, 2]), (6, [2, 2, 1, 1]), (2, [1, 1, 1, 1])):
        net, calls = model(), 0
        optimizer = zoext.ZerothOrderOptimizer(
            net, estimator=zoext.GreedyPool(pool_size=pool), probe_group=distributed.group.WORLD, **SETTINGS
        )
        optimizer.step(lambda net=net: loss(net, 0))

        def closure(net: nn.Module = net) -> Tensor:
            nonlocal calls
            calls += 1
            return loss(net, 1)

        optimizer.step(closure)
        assert calls == expected[rank] + 1, (pool, calls)  # and the probe on the other side of the best


def finds_ranks_with_other_batches(rank: int) -> None:
    net = model()
    optimizer = zoext.MeZO(net, probe_group=distributed.group.WORLD, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"probe_group: ranks have different losses .* the same batch"):
        optimizer.step(lambda: loss(net, rank))
    assert torch.equal(flat(net), flat(model()))


def tells_of_a_closure_that_raised(groups: str, rank: int) -> None:
    """All ranks end the step, whoever raised, and may go on."""
    options: dict[str, Any] = {}
    if groups == "probes":
        options = {"probe_group": distributed.group.WORLD}
    elif groups == "both":
        options = {"process_group": of_data_and_probes()}
    for recipe in ("mezo", "agzo", "greedy"):
        net = model()
        optimizer = RECIPES[recipe](net, **options, **SETTINGS)
        for at in (0, 3, 2):
            before = flat(net)

            def closure(net: nn.Module = net, at: int = at) -> Tensor:
                if rank == at:
                    raise ValueError("no data")
                return loss(net, 0)

            expected = ValueError if rank == at else RuntimeError
            with pytest.raises(
                expected, match="no data" if rank == at else "the closure of .* raised at step"
            ):
                optimizer.step(closure)
            assert torch.equal(flat(net), before)
            optimizer.step(lambda net=net: loss(net, 1))
            check_alike(net)


def goes_on_with_an_estimate_until_the_others_know(recipe: str, rank: int) -> None:
    """On a device, ranks learn of an error when the next step begins, and finish the rounds of this one."""
    net = model()
    optimizer = RECIPES[recipe](net, nonfinite="skip", **{**SETTINGS, "weight_decay": 0.0})
    before = flat(net)

    def closure() -> Tensor:
        if rank == 1:
            raise ValueError("no data")
        return loss(net, 0)

    with mock.patch.object(Ranks, "raise_if_differing"):
        if rank == 1:
            with pytest.raises(ValueError, match="no data"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
    assert torch.equal(flat(net), before)
    assert optimizer.param_groups[0]["step"] == 1  # on all ranks, so that they stay in step
    if rank != 1:  # which knows
        with pytest.raises(RuntimeError, match="the closure of rank 1 raised at step 0"):
            optimizer.step(lambda: loss(net, 0))
    optimizer.step(lambda: loss(net, 1))
    check_alike(net)
    assert not torch.equal(flat(net), before)


def weighs_losses(rank: int) -> None:
    """The step of the whole batch, whose parts have 1, 2, 3 and no rows."""
    rows = [1, 2, 3, 0]
    net, alone = model().eval(), model().eval()
    optimizer = zoext.MeZO(net, samples=2, **SETTINGS)
    plain = zoext.MeZO(alone, samples=2, process_group=None, **SETTINGS)
    for step in range(3):
        as_tensor = torch.tensor(rows[rank]) if step else rows[rank]
        optimizer.step(lambda step=step, weight=as_tensor: (loss(net, 4 * step + rank, rows[rank]), weight))
        plain.step(
            lambda step=step: sum(
                loss(alone, 4 * step + each, rows[each]).double() * rows[each] / 6 for each in range(3)
            ).float()
        )
        torch.testing.assert_close(
            optimizer.last_estimate.coefficients, plain.last_estimate.coefficients, rtol=1e-3, atol=1e-4
        )
        alone.load_state_dict(net.state_dict())
    check_alike(net)


def refuses_weights_on_some_ranks(rank: int) -> None:
    net = model()
    optimizer = zoext.MeZO(net, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"some ranks return \(loss, weight\) and others a loss alone"):
        optimizer.step(lambda: (loss(net, 0), 2) if rank == 2 else loss(net, 0))
    optimizer.step(lambda: (loss(net, 0), 2))


def refuses_losses_of_other_dtypes(rank: int) -> None:
    """Each rank would round the average to its own; a rank without data may return any NaN."""
    net = model()
    optimizer = zoext.MeZO(net, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"losses of float64, as Python floats are, and others of float32"):
        optimizer.step(lambda: loss(net, 0).item() if rank == 1 else loss(net, 0))
    for step in range(3):
        optimizer.step(lambda step=step: (float("nan"), 0) if rank == 1 else (loss(net, step), 2))
        check_alike(net)
    optimizer.step(lambda: loss(net, 0).double())
    check_alike(net)


def finds_one_rank_that_differs_in_a_mesh(rank: int) -> None:
    """Also on the ranks that share neither its batch nor its probes."""
    for odd in range(RANKS):
        net = model()
        if rank == odd:
            with torch.no_grad():
                net[0].weight.mul_(-2)
        before = flat(net)
        with pytest.raises(RuntimeError, match=r"(other weights|has other|ranks are|have other)"):
            zoext.MeZO(net, process_group=of_data_and_probes(), **SETTINGS).step(lambda net=net: loss(net, 0))
        assert torch.equal(flat(net), before)


def finds_weights_in_another_order_or_scale(rank: int) -> None:
    for change in (
        lambda weight: weight.copy_(weight.flip(0)),
        lambda weight: weight.mul_(-2),
        lambda weight: weight.neg_(),
    ):
        net = model()
        with torch.no_grad():
            if rank == 2:
                change(net[0].weight)
        with pytest.raises(RuntimeError, match="rank 2 has other weights than rank 0"):
            zoext.MeZO(net, **SETTINGS).step(lambda net=net: loss(net, 0))


def applies_pending_estimates(rank: int) -> None:
    """With a closure that returns None, as Lightning passes; nothing is told to the others for it."""
    net, plain = model().eval(), model().eval()
    for its, act in (
        (net, lambda optimizer: optimizer.step(lambda: None)),
        (plain, lambda optimizer: optimizer.step()),
    ):
        optimizer = zoext.MeZO(its, **SETTINGS)
        for step in range(3):
            optimizer.estimate(lambda its=its, step=step: loss(its, 4 * step + rank))
            act(optimizer)
    assert torch.equal(flat(net), flat(plain))
    check_alike(net)


def refuses_groups_that_do_not_fit(rank: int) -> None:
    for given in ({"probe": "inplace"}, {"params": list(model().parameters())}):
        with pytest.raises(ValueError, match="probe_group: probes in place restore weights up to rounding"):
            zoext.MeZO(**{"params": model(), "probe_group": distributed.group.WORLD, **given})
    part = distributed.new_group([0, 1])
    if rank < 2:
        with pytest.raises(ValueError, match="process_group: it must be given if the ranks of probe_group"):
            zoext.MeZO(model(), probe_group=part)
    else:
        with pytest.raises(ValueError, match="probe_group: this rank is not one of its ranks"):
            zoext.MeZO(model(), probe_group=part)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    with pytest.raises(ValueError, match=r"must be named 'data' and 'probe', not \('data', 'model'\)"):
        zoext.MeZO(model(), process_group=mesh)
    zoext.MeZO(model(), process_group=mesh["data"])
    with pytest.raises(ValueError, match="probe_group: process_group is a mesh"):
        zoext.MeZO(model(), process_group=mesh["data"], probe_group=distributed.group.WORLD)


def runs() -> Iterator[tuple[str, int, str]]:
    """Every recipe of each kind on all ranks and on 2 or 3 of them in turn."""
    for kind in ("data", "probes"):
        for number, recipe in enumerate(RECIPES):
            if kind == "probes" or "agzo" not in recipe:  # whose basis is merged from those of all batches
                yield kind, 2 + number % 2, recipe
                yield kind, RANKS, recipe


CASES: dict[str, Case] = {
    f"{kind}, {size} ranks, {recipe}": partial(equals_one_process, kind, size, recipe)
    for kind, size, recipe in runs()
}
CASES |= {
    f"mesh, {recipe}": partial(equals_one_process_on_both_batches, recipe)
    for recipe in RECIPES
    if "agzo" not in recipe  # whose basis is found from parts of the batch
}
CASES |= {
    f"mesh, {recipe}": partial(equals_two_ranks_without_dealt_probes, recipe)
    for recipe in RECIPES
    if "agzo" in recipe
}
CASES |= {
    f"raised, {groups}": partial(tells_of_a_closure_that_raised, groups)
    for groups in ("data", "probes", "both")
}
CASES |= {
    f"raised late, {recipe}": partial(goes_on_with_an_estimate_until_the_others_know, recipe)
    for recipe in ("mezo", "greedy", "agzo", "gv")
}
CASES |= {
    act.__name__: act
    for act in (
        evaluates_a_share,
        finds_ranks_with_other_batches,
        weighs_losses,
        refuses_weights_on_some_ranks,
        refuses_losses_of_other_dtypes,
        finds_one_rank_that_differs_in_a_mesh,
        finds_weights_in_another_order_or_scale,
        applies_pending_estimates,
        refuses_groups_that_do_not_fit,
    )
}

if __name__ == "__main__":
    sys.exit(run_cases(CASES, RANKS, prepare=run_alone))
