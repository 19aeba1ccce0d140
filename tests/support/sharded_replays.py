"""Replays on shards, in four processes that have imported everything once. Run as a program.

``python -m support.sharded_replays FOLDER`` records runs of an unsharded model there and then goes through
all cases. Rank R writes a line of JSON for each to ``FOLDER/R.jsonl``: its name, and what went wrong.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import zoext
from support.faulty_runs import NAMED
from support.graphed_runs import RECIPES, Run, same
from support.ranks import fork, join
from zoext._parameters.shards import block_of, part_of

RANKS = 4
STEPS = 4
KINDS = {
    "float32": (torch.float32, "stochastic"),
    "bfloat16": (torch.bfloat16, "stochastic"),
    "residual": (torch.bfloat16, "residual"),
    "float16": (torch.float16, "stochastic"),
}
RUNS = [f"{recipe} {kind}" for recipe in NAMED for kind in KINDS]
SOME_RUNS = [f"{recipe} {list(KINDS)[number % 4]}" for number, recipe in enumerate(NAMED)]


class Meshes(NamedTuple):
    four: DeviceMesh
    three: DeviceMesh  # of which rank 3 is no part
    two: DeviceMesh
    grid: DeviceMesh


class Layout(NamedTuple):
    """How the parameters of a model are spread over ranks, and how many ranks take part."""

    spread: Callable[[nn.Module, Meshes], object]
    ranks: int = RANKS


Placements = tuple[Placement, ...]


def spread(model: nn.Module, mesh: DeviceMesh, *placements: Placement, vectors: Placements) -> None:
    """Matrices so, vectors otherwise."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            these = placements if parameter.dim() > 1 else vectors
            part = distribute_tensor(parameter.detach(), mesh, these, src_data_rank=None)
            setattr(module, name, nn.Parameter(part))


def over_tensor_parallel(model: nn.Module, meshes: Meshes) -> None:
    """FSDP2 over tensor parallelism: strided shards with consecutive rows, and blocks of rows and columns."""
    parallelize_module(model, meshes.grid["columns"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
    fully_shard(model, mesh=meshes.grid["rows"])


LAYOUTS = {
    "FSDP2 on four": Layout(lambda model, meshes: fully_shard(model, mesh=meshes.four)),
    "FSDP2 on three": Layout(lambda model, meshes: fully_shard(model, mesh=meshes.three), 3),
    "FSDP2 on two, replicated": Layout(lambda model, meshes: fully_shard(model, mesh=meshes.grid)),
    "FSDP2 over tensor parallel": Layout(over_tensor_parallel),
    "columns": Layout(lambda m, meshes: spread(m, meshes.three, Shard(1), vectors=(Shard(0),)), 3),
    "blocks": Layout(
        lambda m, meshes: spread(m, meshes.grid, Shard(0), Shard(1), vectors=(Replicate(), Shard(0)))
    ),
    "rows in rows": Layout(
        lambda m, meshes: spread(m, meshes.grid, Shard(0), Shard(0), vectors=(Shard(0), Shard(0)))
    ),
    "copies": Layout(lambda m, meshes: spread(m, meshes.two, Replicate(), vectors=(Replicate(),)), 2),
}
OFTEN = ("FSDP2 on four", "blocks")


class Rank:
    """What a case knows of its process."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.folder = folder
        join(number, RANKS, folder)
        self.meshes = Meshes(
            init_device_mesh("cpu", (4,)),
            DeviceMesh("cpu", [0, 1, 2]),
            DeviceMesh("cpu", [0, 1]),
            init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns")),
        )

    def path(self, run: str) -> Path:
        return self.folder / f"{run}.jsonl"

    def tuned(self, run: str) -> dict[str, Any]:
        """Weights and residuals of an unsharded run at its end."""
        found: dict[str, Any] = torch.load(self.folder / f"{run}.pt", weights_only=True)
        return found

    def sharded(self, run: str, layout: str) -> nn.Module:
        model = base(run)
        LAYOUTS[layout].spread(model, self.meshes)
        return model


def base(run: str) -> nn.Module:
    """The model with the weights that a run begins with."""
    return begin(run).model


def begin(run: str) -> Run:
    recipe, _, kind = run.rpartition(" ")
    dtype, precision = KINDS[kind]
    return Run(recipe, graphed=False, dtype=dtype, precision=precision)


def optimizer_of(run: str, model: nn.Module) -> zoext.ZerothOrderOptimizer:
    """As that of the run, on another model."""
    recipe, _, kind = run.rpartition(" ")
    settings = {"lr": 2e-2, "mu": 1e-2, "weight_decay": 0.1, "seed": 5, "precision": KINDS[kind][1]}
    return RECIPES[recipe](model, **settings)


def record(run: str, folder: Path) -> None:
    recorded = begin(run)
    with zoext.Trajectory(folder / f"{run}.jsonl", recorded.optimizer, frames=True):
        recorded.steps(range(STEPS))
    residuals = {
        name: recorded.optimizer.state[parameter]["residual"]
        for name, parameter in recorded.model.named_parameters()
        if "residual" in recorded.optimizer.state[parameter]
    }
    weights = {name: parameter.detach() for name, parameter in recorded.model.named_parameters()}
    torch.save({"weights": weights, "residuals": residuals}, folder / f"{run}.pt")


@torch.no_grad()
def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole weights."""
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in model.named_parameters()
    }


@torch.no_grad()
def local(model: nn.Module) -> list[Tensor]:
    parts = (p.to_local() if isinstance(p, DTensor) else p.detach() for p in model.parameters())
    return [part.clone() for part in parts]


@contextmanager
def refused(model: nn.Module, kind: type[Exception], pattern: str) -> Iterator[None]:
    """The block raises this, and leaves the model's weights as they are."""
    before = local(model)
    with pytest.raises(kind, match=pattern):
        yield
    assert same(local(model), before)


def record_losses(path: Path, model: nn.Module, recipe: str, **options: Any) -> None:
    """A run on losses that do not depend on the model."""
    losses = iter(range(100))
    optimizer = RECIPES[recipe](model, process_group=None, **options)
    with zoext.Trajectory(path, optimizer):
        for _ in range(STEPS):
            asked = optimizer.ask()
            while asked is not None:
                asked = optimizer.tell([0.01 * next(losses) ** 2 for _ in range(len(asked))])
            optimizer.step()


# Cases. Each is called by all ranks that take part in it.


def replayed(rank: Rank, run: str, layout: str) -> None:
    model = rank.sharded(run, layout)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = zoext.replay(model, rank.path(run))
    tuned = rank.tuned(run)
    assert same(gathered(model), tuned["weights"])
    assert not same(gathered(base(run)), tuned["weights"])
    assert optimizer.param_groups[0]["step"] == STEPS
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, residual in tuned["residuals"].items():
        parameter = dict(model.named_parameters())[name]
        block = block_of(parameter)
        for dim, (offset, size) in enumerate(zip(block.offsets, block.sizes, strict=True)):
            residual = residual.narrow(dim, offset, size)
        assert same(part_of(optimizer.state[parameter]["residual"]), residual)


def kernels_of_convolutions(rank: Rank) -> None:
    """Of four dimensions, of which the first is one of the matrix and all others are the other one."""
    torch.manual_seed(5)
    unsharded = nn.Sequential(nn.Conv2d(3, 5, (4, 2)), nn.Conv1d(5, 3, 2)).to(torch.bfloat16)
    bases = [copy.deepcopy(unsharded) for _ in range(8)]
    path = rank.folder / f"convolutions {rank.number}.jsonl"
    record_losses(path, unsharded, "adam over lozo", lr=1e-2, precision="residual")
    for dim in range(4):
        for first in (Replicate(), Shard(0)):
            model = bases.pop()
            for module, last in zip(model, (dim, min(dim, 2)), strict=True):
                spread(module, rank.meshes.grid, first, Shard(last), vectors=(Shard(0), Replicate()))
            zoext.replay(model, path)
            assert same(gathered(model), {n: p.detach() for n, p in unsharded.named_parameters()}), (
                dim,
                first,
            )


def other_weights(rank: Rank) -> None:
    """One element on one rank."""
    for layout in OFTEN:
        model = rank.sharded("mezo float32", layout)
        if rank.number == 1:
            with torch.no_grad():
                next(model.parameters()).to_local()[0, 0] += 1
        with refused(model, zoext.TrajectoryError, r"weights mismatch: 0\.weight .*1 of 10"):
            zoext.replay(model, rank.path("mezo float32"))


def a_copy_that_differs(rank: Rank) -> None:
    model = rank.sharded("mezo float32", "copies")
    if rank.number == 1:
        with torch.no_grad():
            next(model.parameters()).to_local()[0, 0] += 1
    pattern = "weights mismatch" if rank.number == 1 else "another rank refused"
    with refused(model, zoext.TrajectoryError, pattern):
        zoext.replay(model, rank.path("mezo float32"))


def a_file_that_one_rank_cannot_read(rank: Rank) -> None:
    model = rank.sharded("mezo float32", "FSDP2 on four")
    path = rank.folder / "nowhere.jsonl" if rank.number == 2 else rank.path("mezo float32")
    kind = FileNotFoundError if rank.number == 2 else zoext.TrajectoryError
    with refused(model, kind, "nowhere" if rank.number == 2 else "another rank refused"):
        zoext.replay(model, path)


def ranks_that_read_different_trajectories(rank: Rank) -> None:
    model = rank.sharded("mezo float32", "FSDP2 on four")
    with refused(model, zoext.TrajectoryError, "different trajectories.*same file and the same to_step"):
        zoext.replay(model, rank.path("mezo float32"), to_step=3 if rank.number == 3 else 2)


def an_optimizer_in_the_middle_on_one_rank(rank: Rank) -> None:
    """Residuals that only one rank has: the others learn of it before they wait for its weights."""
    run = "mezo residual"
    model = rank.sharded(run, "FSDP2 on four")
    optimizer = optimizer_of(run, model)
    if rank.number == 1:
        optimizer.engine.look()
        optimizer.state[model[0].weight]["residual"] += 1
    pattern = "depends on its earlier steps" if rank.number == 1 else "another rank refused"
    with refused(model, zoext.TrajectoryError, pattern):
        zoext.replay(optimizer, rank.path(run))


def placements_that_no_span_describes(rank: Rank) -> None:
    torch.manual_seed(1)
    unsharded = nn.ParameterDict({"a": torch.randn(8, 4, 4)})
    path = rank.folder / f"refused {rank.number}.jsonl"
    record_losses(path, unsharded, "mezo")
    for placements, pattern in (
        ((Partial(), Replicate()), r"a has the placements Partial\(sum\), Replicate\(\).*redistribute\(\)"),
        ((Shard(1), Shard(2)), r"a has the placements Shard\(dim=1\), Shard\(dim=2\).*redistribute\(\)"),
        (
            (Shard(0), _StridedShard(0, split_factor=2)),
            r"a has.*StridedShard.*not consecutive.*redistribute\(\)",
        ),
    ):
        model = nn.ParameterDict({"a": part_with(unsharded["a"], rank.meshes.grid, placements)})
        with refused(model, zoext.TrajectoryError, pattern):
            zoext.replay(model, path)


def a_rank_outside_of_the_mesh(rank: Rank) -> None:
    if rank.number == 3:
        model = rank.sharded("mezo float32", "columns")
        with refused(model, zoext.TrajectoryError, r"0\.weight is on a mesh that this rank is no part of"):
            zoext.replay(model, rank.path("mezo float32"))


def part_with(tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """Of the right shapes; the values do not matter."""
    part = tensor.detach()
    for placement, coordinate, size in zip(placements, mesh.get_coordinate(), mesh.shape, strict=True):
        if not isinstance(placement, Replicate | Partial):
            part = part.tensor_split(size, placement.dim)[coordinate]
    whole = DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return nn.Parameter(whole)


def weights_that_a_forward_has_gathered(rank: Rank) -> None:
    """FSDP2 keeps copies of the root's weights, and drops them for the shards when it likes to."""
    run = "mezo float32"
    x = torch.linspace(-1, 1, 14).reshape(2, 7)
    model, tuned = rank.sharded(run, "FSDP2 on four").eval(), base(run).eval()
    zoext.replay(tuned, rank.path(run))
    with torch.no_grad():
        model(x)
        assert not isinstance(model[0].weight, DTensor)
        zoext.replay(model, rank.path(run))
        assert same(model(x), tuned(x))
        model.reshard()
        assert same(model(x), tuned(x))


def an_optimizer_as_target(rank: Rank) -> None:
    """Its state continues, with the residuals of this rank."""
    run = "adamezo residual"
    first, second = (rank.sharded(run, "FSDP2 on four") for _ in range(2))
    optimizer = optimizer_of(run, first)
    versions = [parameter._version for parameter in first.parameters()]
    assert zoext.replay(optimizer, rank.path(run)) is optimizer
    assert all(p._version > v for p, v in zip(first.parameters(), versions, strict=True))
    assert same(gathered(first), rank.tuned(run)["weights"])
    other = optimizer_of(run, second)
    other.load_state_dict(optimizer.state_dict())
    assert same(other.state_dict(), optimizer.state_dict())


def a_sum_of_trajectories(rank: Rank) -> None:
    paths = [rank.path("mezo float32"), rank.path("greedy float32")]
    model, unsharded = rank.sharded("mezo float32", "blocks"), base("mezo float32")
    zoext.replay(model, paths)
    zoext.replay(unsharded, paths)
    assert same(gathered(model), gathered(unsharded))


def frozen_parameters(rank: Rank) -> None:
    """Sharded as they like, and compared with those of the run all the same."""
    torch.manual_seed(1)
    unsharded = nn.ParameterDict({"a": torch.randn(4, 4, 4), "b": torch.randn(3, 5)})
    unsharded["a"].requires_grad_(False)
    path = rank.folder / f"frozen {rank.number}.jsonl"
    start = copy.deepcopy(unsharded)
    record_losses(path, unsharded, "mezo", lr=0.1)
    model = nn.ParameterDict(start)
    spread(model, rank.meshes.grid, Shard(1), Shard(1), vectors=())
    model["a"] = distribute_tensor(start["a"].detach(), rank.meshes.grid, (Shard(1), Shard(2)))
    zoext.replay(model, path)
    assert same(gathered(model), gathered(unsharded))
    assert not model["a"].requires_grad


class Case(NamedTuple):
    act: Callable[[Rank], None]
    ranks: int = RANKS


def _replay_case(run: str, layout: str) -> Case:
    return Case(lambda rank: replayed(rank, run, layout), LAYOUTS[layout].ranks)


CASES = {
    f"{layout}: {run}": _replay_case(run, layout)
    for layout in LAYOUTS
    for run in (RUNS if layout in OFTEN else SOME_RUNS)
}
CASES |= {
    case.__name__: Case(case)
    for case in (
        kernels_of_convolutions,
        other_weights,
        a_file_that_one_rank_cannot_read,
        ranks_that_read_different_trajectories,
        an_optimizer_in_the_middle_on_one_rank,
        placements_that_no_span_describes,
        a_rank_outside_of_the_mesh,
        weights_that_a_forward_has_gathered,
        an_optimizer_as_target,
        a_sum_of_trajectories,
        frozen_parameters,
    )
}
CASES["a_copy_that_differs"] = Case(a_copy_that_differs, 2)


def run_cases(number: int, folder: Path) -> None:
    for run in RUNS[number::RANKS]:  # alone: in a process group, ranks would average their losses
        record(run, folder)
    rank = Rank(number, folder)
    distributed.barrier()
    with (folder / f"{number}.jsonl").open("w", buffering=1) as results:
        for name, case in CASES.items():
            error = None
            if number < case.ranks:
                try:
                    case.act(rank)
                except Exception:
                    error = traceback.format_exc()
            results.write(json.dumps([name, error]) + "\n")


if __name__ == "__main__":
    sys.exit(fork(RANKS, lambda number: run_cases(number, Path(sys.argv[1]))))
