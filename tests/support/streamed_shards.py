"""Streamed probes of sharded models: the cases of ``test_streamed_probes_on_shards``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zoext
from support.graphed_runs import RECIPES
from support.oracle import bits
from support.ranks import Case, run_cases

RANKS = 4
STEPS = 3


class Net(nn.Module):
    """A frozen layer, running statistics, a module that never runs, and rows that ranks share unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(7, 9).requires_grad_(False)
        self.first = nn.Linear(9, 11)
        self.norm = nn.BatchNorm1d(11)
        self.second = nn.Linear(11, 5)
        self.head = nn.Linear(5, 3, bias=False)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(self.frozen(x))))
        return self.head(torch.tanh(self.second(x)))

    def loss(self, x: Tensor) -> Tensor:
        return self(x).float().square().mean()


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(7)
    return Net().to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(step)).to(dtype)


def of_layers(model: Net, **options: Any) -> None:
    for layer in (model.first, model.second, model.unused):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def prefetching(model: Net) -> None:
    of_layers(model)
    model.set_modules_to_forward_prefetch([model.first, model.second])  # type: ignore[operator]
    model.first.set_modules_to_forward_prefetch([model.second])  # type: ignore[operator]


def on_a_grid(model: Net) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


SHARDED: dict[str, Callable[[Net], object]] = {
    "whole": fully_shard,
    "layers": of_layers,
    "layers that stay gathered": partial(of_layers, reshard_after_forward=False),
    "layers that two ranks keep": partial(of_layers, reshard_after_forward=2),
    "layers that are prefetched": prefetching,
    "replicated": on_a_grid,
}


def optimizer_of(recipe: str, model: nn.Module, **options: Any) -> zoext.ZerothOrderOptimizer:
    settings = {"lr": 3e-3, "mu": 1e-2, "weight_decay": 0.1, "seed": 5, **options}
    return RECIPES[recipe](model, **settings)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: bits((value.full_tensor() if isinstance(value, DTensor) else value).detach().clone())
        for name, value in model.state_dict().items()
    }


def parts(model: nn.Module) -> list[Tensor]:
    return [bits(p.to_local() if isinstance(p, DTensor) else p).clone() for p in model.parameters()]


def assert_same(sharded: nn.Module, alone: nn.Module) -> None:
    now, expected = whole(sharded), whole(alone)
    assert now.keys() == expected.keys()
    for name in now:
        assert torch.equal(now[name], expected[name]), name


def compare(
    model: Net,
    alone: Net,
    recipe: str = "mezo",
    loss: Callable[[Net, Tensor], Tensor] = Net.loss,
    alone_loss: Callable[[Net, Tensor], Tensor] | None = None,
    steps: int = STEPS,
) -> None:
    """Losses, parameters and running statistics have the bits of an unsharded run."""
    dtype = next(alone.parameters()).dtype
    sharded = optimizer_of(recipe, model)
    # A basis is found from the batches of all ranks, here equal ones, in the same way.
    plain = optimizer_of(recipe, alone, **({} if recipe == "agzo" else {"process_group": None}))
    assert isinstance(sharded.probe, zoext.StreamedProbe)
    start = whole(alone)
    for step in range(steps):
        x = batch(step, dtype)
        found = sharded.step(lambda x=x: loss(model, x))
        assert torch.equal(found, plain.step(lambda x=x: (alone_loss or loss)(alone, x))), step
        assert_same(model, alone)
    assert not torch.equal(start["head.weight"], whole(alone)["head.weight"])
    assert_same(model, alone)


# Cases. Each is called by all ranks.


def trains_as_the_unsharded_model(layout: str, recipe: str, dtype: torch.dtype, rank: int) -> None:
    model, alone = net(dtype), net(dtype)
    for each in (model, alone) if recipe == "agzo" else ():
        each.unused.requires_grad_(
            False
        )  # of which the watch for products does not know when it is a DTensor
    SHARDED[layout](model)
    compare(model, alone, recipe)


def casts_displaced_shards(rank: int) -> None:
    """With mixed precision: displacing what was gathered in bfloat16 would be rounded in another way."""
    model, alone = net(), net()
    model.norm, alone.norm = nn.LayerNorm(11), nn.LayerNorm(11)
    of_layers(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    def cast(model: Net, x: Tensor) -> Tensor:
        weights = {name: value.bfloat16() for name, value in model.named_parameters()}
        return torch.func.functional_call(model, weights, (x.bfloat16(),)).float().square().mean()

    compare(model, alone, alone_loss=cast)


def gathers_what_the_closure_asks_for(rank: int) -> None:
    model, alone = net(), net()
    of_layers(model, reshard_after_forward=False)

    def loss(each: Net, x: Tensor) -> Tensor:
        if isinstance(each.second, FSDPModule):
            handle = each.second.unshard(async_op=True)
            found = each.loss(x)
            assert handle is not None
            handle.wait()
            for module in (each.first, each.second):
                module.reshard()  # type: ignore[operator]
                module.unshard()  # type: ignore[operator]
            return found + each.loss(x)
        return each.loss(x) + each.loss(x)

    compare(model, alone, loss=loss)


def follows_other_methods(rank: int) -> None:
    model, alone = net(), net()
    of_layers(model)
    register_fsdp_forward_method(model, "loss")
    compare(model, alone)


def moves_shards_that_the_closure_reads(rank: int) -> None:
    """They are found in the first probe, and displaced for the whole closure."""
    model, alone = net(), net()
    of_layers(model)

    def penalised(each: Net, x: Tensor) -> Tensor:
        weight = each.second.weight
        seen = weight.full_tensor() if isinstance(weight, DTensor) else weight
        norm = seen.square().sum()
        loss = each.loss(x) + norm
        again = each.second.weight
        return loss + (again.full_tensor() if isinstance(again, DTensor) else again).abs().sum()

    compare(model, alone, loss=penalised)
    probe = optimizer_of("mezo", model)
    probe.step(lambda: penalised(model, batch(0)))
    assert "second.weight" in probe.probe.describe()


def differentiates(rank: int) -> None:
    """A backward gathers weights again."""
    model, alone = net(), net()
    of_layers(model)

    def slope(each: Net, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(each.loss(x), x)
        return gradient.square().sum().detach()

    compare(model, alone, loss=slope)


def restores_after_errors(error: type[BaseException], where: str, rank: int) -> None:
    model, alone = net().eval(), net().eval()
    of_layers(model, reshard_after_forward=False)
    optimizer = zoext.MeZO(model, lr=1e-2, mu=1e-2, seed=5)
    before, x = parts(model), batch(0)
    with torch.no_grad():
        expected = alone.loss(x)
        assert torch.equal(model.loss(x), expected)
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error("in the second probe")

    handle = model.second.register_forward_hook(fail) if where == "a forward" else None

    def closure() -> Tensor:
        loss = model.loss(x)
        if where == "one rank":
            if rank == 1:
                fail()
        elif handle is None:
            fail()
        return loss

    raised = error if where != "one rank" or rank == 1 else RuntimeError
    with pytest.raises(raised, match="second probe" if raised is error else "rank 1"):
        optimizer.step(closure)
    if handle is not None:
        handle.remove()
    assert all(map(torch.equal, parts(model), before))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.loss(x), expected)
    plain = zoext.MeZO(alone, lr=1e-2, mu=1e-2, seed=5, process_group=None)
    assert torch.equal(optimizer.step(lambda: model.loss(x)), plain.step(lambda: alone.loss(x)))
    assert_same(model, alone)


def writes_no_shard(rank: int) -> None:
    """Not even while a probe runs."""
    model = net()
    of_layers(model)
    optimizer = zoext.MeZO(model, lr=1e-2, mu=1e-2, seed=5)
    before = parts(model)
    memory = [parameter.to_local() for parameter in model.parameters()]  # type: ignore[operator]
    seen = 0

    def look(*_: Any) -> None:
        nonlocal seen
        seen += 1
        assert all(torch.equal(bits(now), then) for now, then in zip(memory, before, strict=True))

    for _ in range(2):  # in which the watch would find the reads of the test
        optimizer.estimate(lambda: model.loss(batch(0)))
    model.second.register_forward_pre_hook(look)
    estimate = optimizer.estimate(lambda: model.loss(batch(0)))
    assert seen == 2
    assert estimate.coefficients.abs().min() > 0


def plan() -> dict[str, Any]:
    gathered = ColwiseParallel(output_layouts=Replicate())  # for the running statistics
    return {"first": gathered, "second": RowwiseParallel(input_layouts=Replicate())}


def over_tensor_parallel(model: Net) -> None:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    parallelize_module(model, grid["columns"], plan())
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=grid["rows"])
    fully_shard(model, mesh=grid["rows"])


def tensor_parallel(model: Net) -> None:
    mesh = init_device_mesh("cpu", (4,))
    parallelize_module(model, mesh, plan())


def blocks(model: Net) -> None:
    """Other placements, of modules whose inputs and outputs are DTensors."""
    grid = init_device_mesh("cpu", (2, 2))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            cut = (Shard(0), Shard(1)) if parameter.dim() > 1 else (Replicate(), Shard(0))
            part = nn.Parameter(distribute_tensor(parameter.detach(), grid, cut, src_data_rank=None))
            setattr(module, name, part.requires_grad_(parameter.requires_grad))
        if isinstance(module, nn.Linear):

            def entering(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
                return (DTensor.from_local(args[0], grid, [Replicate(), Replicate()]),)

            def leaving(module: nn.Module, args: tuple[Tensor], output: Any) -> Tensor:
                return output.full_tensor()

            module.register_forward_pre_hook(entering)
            module.register_forward_hook(leaving)
    model.norm = nn.BatchNorm1d(11)


def runs_displaced_parts(spread: Callable[[Net], object], recipe: str, rank: int) -> None:
    """Layers see the weights of an unsharded run with the same losses, whose forwards round otherwise."""
    model, alone = net(), net()
    spread(model)
    if spread is blocks:
        alone.norm = nn.BatchNorm1d(11)
    seen: dict[Net, list[tuple[str, Tensor]]] = {model: [], alone: []}
    for each, found in seen.items():
        for name in ("first", "second", "head"):

            def look(module: nn.Module, *_: Any, name: str = name, found: Any = found) -> None:
                weight = module.weight.detach()  # type: ignore[union-attr]
                found.append(
                    (name, (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone())
                )

            getattr(each, name).register_forward_pre_hook(look)
    sharded = optimizer_of(recipe, model)
    plain = optimizer_of(recipe, alone, process_group=None)
    for step in range(STEPS):
        for each, optimizer in ((model, sharded), (alone, plain)):
            calls: list[int] = []

            def closure(each: Net = each, calls: list[int] = calls, step: int = step) -> Tensor:
                each.loss(batch(step))
                calls.append(0)
                return torch.tensor(1.0 + 0.01 * (7 * (len(calls) + 3 * step) % 11))

            optimizer.step(closure)
        assert [name for name, _ in seen[model]] == [name for name, _ in seen[alone]]
        for (name, now), (_, then) in zip(seen[model], seen[alone], strict=True):
            assert torch.equal(bits(now), bits(then)), (step, name)
        for (name, now), then in zip(model.named_parameters(), alone.parameters(), strict=True):
            full = now.full_tensor() if isinstance(now, DTensor) else now
            assert torch.equal(bits(full), bits(then)), (step, name)


def refuses_parts_of_a_sharded_model(rank: int) -> None:
    """Whose FSDPModule gathers more than the optimizer streams."""
    model = net()
    fully_shard(model)
    before = parts(model)
    memory = [parameter.to_local() for parameter in model.parameters()]  # type: ignore[operator]
    optimizer = zoext.MeZO(model.first)
    with pytest.raises(zoext.StreamedProbeError, match=r"weight was gathered by an FSDPModule.*whole model"):
        optimizer.step(lambda: model.loss(batch(0)))
    assert all(torch.equal(bits(now), then) for now, then in zip(memory, before, strict=True))


def refuses_to_deal_out_probes_of_shards(rank: int) -> None:
    model = net()
    fully_shard(model)
    optimizer = zoext.MeZOGreedy(model, probe_group=torch.distributed.group.WORLD)
    with pytest.raises(ValueError, match=r"probe_group: first\.weight is sharded over ranks"):
        optimizer.step(lambda: model.loss(batch(0)))


KINDS = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["mezo", "agzo", "lozo", "fzoo", "adam over lozo", "greedy", "gv"]
RUNS = [
    (layout, NAMES[(number + shift) % len(NAMES)], KINDS[(number + shift) % len(KINDS)])
    for number, layout in enumerate(SHARDED)
    for shift in ((0, 1) if layout == "layers" else (0,))
]
CASES: dict[str, Case] = {
    f"{layout}: {recipe} {dtype}": partial(trains_as_the_unsharded_model, layout, recipe, dtype)
    for layout, recipe, dtype in RUNS
}
CASES |= {
    f"{spread.__name__}: {recipe}": partial(runs_displaced_parts, spread, recipe)
    for spread, recipe in ((over_tensor_parallel, "lozo"), (tensor_parallel, "mezo"), (blocks, "momentum"))
}
CASES |= {
    f"{error.__name__} in {where}": partial(restores_after_errors, error, where)
    for error, where in (
        (ValueError, "the closure"),
        (KeyboardInterrupt, "the closure"),
        (ValueError, "a forward"),
        (KeyboardInterrupt, "a forward"),
        (ValueError, "one rank"),
    )
}
CASES |= {
    act.__name__: act
    for act in (
        casts_displaced_shards,
        gathers_what_the_closure_asks_for,
        follows_other_methods,
        moves_shards_that_the_closure_reads,
        differentiates,
        writes_no_shard,
        refuses_parts_of_a_sharded_model,
        refuses_to_deal_out_probes_of_shards,
    )
}

if __name__ == "__main__":
    sys.exit(run_cases(CASES, RANKS))
