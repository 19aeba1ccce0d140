"""Training of sharded models: the cases of ``test_sharded_models_train``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zoext
from support.graphed_runs import RECIPES
from support.ranks import Case, first, run_cases
from support.sharded_replays import KINDS, LAYOUTS, RANKS, Meshes

STEPS = 6  # twice as many as the longest window and refresh interval of a recipe
GATHERED = [name for name in LAYOUTS if name.startswith("FSDP2") and "tensor" not in name]


@cache  # groups take long to make
def meshes() -> Meshes:
    return Meshes(
        init_device_mesh("cpu", (4,)),
        DeviceMesh("cpu", [0, 1, 2]),
        DeviceMesh("cpu", [0, 1]),
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns")),
    )


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    layers = nn.Linear(7, 11), nn.GELU(), nn.LayerNorm(11), nn.Linear(11, 5), nn.GELU(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


def optimizer_of(recipe: str, kind: str, model: nn.Module, **options: Any) -> zoext.ZerothOrderOptimizer:
    settings = {"lr": 3e-3, "mu": 1e-2, "weight_decay": 0.1, "seed": 5, "precision": KINDS[kind][1]}
    return RECIPES[recipe](model, probe="inplace", **settings, **options)


def given_losses() -> Iterator[float]:
    """The same numbers in every run, as a forward that is split over ranks rounds in its own way."""
    return (1.0 + 0.01 * ((7 * number) % 11) for number in count())


def loss_of(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(step)).to(dtype)
    return model(x).float().square().mean()


def closures(model: nn.Module, runs: bool) -> Callable[[int], Callable[[], Any]]:
    losses = given_losses()
    return lambda step: (lambda: loss_of(model, step)) if runs else (lambda: next(losses))


class Alone(NamedTuple):
    """A run of the unsharded model."""

    losses: list[Tensor]
    weights: dict[int, list[Tensor]]  # after some of the steps

    @classmethod
    def of(cls, recipe: str, kind: str, runs: bool, group: Any = None) -> Alone:
        model = model_of(KINDS[kind][0])
        optimizer = optimizer_of(recipe, kind, model, process_group=group)
        closure = closures(model, runs)
        run = cls([], {})
        for step in range(STEPS):
            run.losses.append(optimizer.step(closure(step)))
            if step in (0, STEPS - 1):
                run.weights[step] = [parameter.detach().clone() for parameter in model.parameters()]
        return run


#: By recipe, kind of weights, and whether the model runs.
ALONE: dict[tuple[str, str, bool], Alone] = {}


def run_alone() -> None:
    for layout, recipe, kind in runs():
        key = recipe, kind, layout in GATHERED
        if key not in ALONE and "agzo" not in recipe:
            ALONE[key] = Alone.of(*key)


def trains_as_the_unsharded_model(layout: str, recipe: str, kind: str, rank: int) -> None:
    """Losses have the bits of an unsharded run on each step, and parameters after the first and the last."""
    of = meshes()
    spread, ranks = LAYOUTS[layout]
    group = first(ranks)
    if rank >= ranks:
        return
    is_run = layout in GATHERED
    # A basis is found from the batches of all ranks, here equal ones, in the same way.
    alone = Alone.of(recipe, kind, is_run, group) if "agzo" in recipe else ALONE[recipe, kind, is_run]
    model = model_of(KINDS[kind][0])
    spread(model, of)
    optimizer = optimizer_of(recipe, kind, model, process_group=group)
    closure = closures(model, is_run)
    for step in range(STEPS):
        assert torch.equal(optimizer.step(closure(step)), alone.losses[step]), step
        if step in alone.weights:
            for (name, part), whole in zip(model.named_parameters(), alone.weights[step], strict=True):
                assert torch.equal(part.full_tensor(), whole), (step, name)
    assert not any(map(torch.equal, alone.weights[STEPS - 1], model_of(KINDS[kind][0]).parameters()))
    if is_run:
        plain = model_of(KINDS[kind][0])
        for parameter, weight in zip(plain.parameters(), alone.weights[STEPS - 1], strict=True):
            parameter.data.copy_(weight)
        with torch.no_grad():
            assert torch.equal(loss_of(model, 0), loss_of(plain, 0))


def has_batches_of_its_own(rank: int) -> None:
    """FSDP2 is data parallel: the loss is the mean over the ranks."""
    model, alone = model_of(torch.float32), model_of(torch.float32)
    fully_shard(model[0])
    fully_shard(model)
    sharded = zoext.MeZO(model, lr=3e-3, mu=1e-2)
    plain = zoext.MeZO(alone, lr=3e-3, mu=1e-2, process_group=None)
    for step in range(3):
        sharded.step(lambda step=step: loss_of(model, 4 * step + rank))
        plain.step(
            lambda step=step: (
                torch.stack([loss_of(alone, 4 * step + each).double() for each in range(RANKS)])
                .mean()
                .float()
            )
        )
    for part, whole in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(part.full_tensor(), whole)


def frees_what_a_forward_gathered_that_raised(rank: int) -> None:
    """Which FSDP2's own ``reshard`` does not, and the next forward would read displaced weights."""
    model = model_of(torch.float32)
    fully_shard(model[0])
    fully_shard(model)
    with torch.no_grad():
        expected = loss_of(model, 0)
    optimizer = zoext.MeZO(model, lr=3e-3, mu=1e-1, probe="inplace")

    def fail(*_: Any) -> None:
        raise KeyError("a forward")

    handle = model[3].register_forward_hook(fail)
    with pytest.raises(KeyError, match="a forward"):
        optimizer.step(lambda: loss_of(model, 0))
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, 0), expected)


def refuses_ranks_that_exchange_no_losses(rank: int) -> None:
    """The parts of one model would take different steps."""
    model = model_of(torch.float32)
    fully_shard(model)
    own = distributed.new_group([rank], use_local_synchronization=True)
    for group in (None, own):
        optimizer = zoext.MeZO(model, process_group=group)
        with pytest.raises(
            ValueError, match=r"process_group: ranks that hold parts of 0\.weight do not exchange"
        ):
            optimizer.step(lambda: loss_of(model, 0))


def refuses_agzo_over_tensor_parallelism(rank: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    model = model_of(torch.float32)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
    with pytest.raises(ValueError, match=r"0\.weight is a DTensor while its layer runs.*use FSDP2"):
        zoext.AGZO(model).step(lambda: loss_of(model, 0))


def runs() -> Iterator[tuple[str, str, str]]:
    """Every recipe with each layout that it can have, and kinds of weights in turn."""
    for number, recipe in enumerate(RECIPES):
        for layout in LAYOUTS:
            if layout in GATHERED or "agzo" not in recipe:  # which observes a forward
                yield layout, recipe, list(KINDS)[number % len(KINDS)]


CASES: dict[str, Case] = {
    f"{layout}: {recipe} {kind}": partial(trains_as_the_unsharded_model, layout, recipe, kind)
    for layout, recipe, kind in runs()
}
CASES |= {
    act.__name__: act
    for act in (
        has_batches_of_its_own,
        frees_what_a_forward_gathered_that_raised,
        refuses_agzo_over_tensor_parallelism,
        refuses_ranks_that_exchange_no_losses,
    )
}

if __name__ == "__main__":
    sys.exit(run_cases(CASES, RANKS, prepare=run_alone))
