"""A run of a whole model is replayed on its shards, to the bits of the run, or refused by all ranks alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

pytest.importorskip("safetensors", reason="the frames of trajectories are written with it")

from support.graphed_runs import same
from support.ranks import errors_of
from support.sharded_replays import CASES, OFTEN, RANKS, SOME_RUNS
from zoext._parameters.parameters import Parameters
from zoext._parameters.shards import Block, _is_consecutive
from zoext.directions import ActivationSubspace, Frame, LowRank, Terms, Window
from zoext.ops import Rounding, Rule, span_of

Results = dict[str, list[str | None]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What went wrong in each case, for each rank."""
    return errors_of("support.sharded_replays", tmp_path_factory.mktemp("shards"), RANKS)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(case: str, results: Results) -> None:
    assert len(results[case]) == RANKS
    assert not any(results[case]), "\n".join(filter(None, results[case]))


def test_every_recipe_meets_every_layout_that_is_often_used() -> None:
    assert len(SOME_RUNS) == 6
    assert all(sum(name.startswith(f"{layout}: ") for name in CASES) == 24 for layout in OFTEN)


def indices(block: Block) -> list[int]:
    """The places in the whole parameter, as the kernels have them."""
    base, run, stride = block.span
    return [base + i // run * stride + i % run for i in range(prod(block.sizes))]


def test_spans_of_all_that_placements_make() -> None:
    """Any shape, mesh and coordinate: one dimension cut, or the first and another one; empty parts too."""
    draw = random.Random(4)
    for _ in range(400):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 4)))
        mesh = (draw.randint(1, 4), draw.randint(1, 3))
        other = Shard(draw.randrange(len(shape)))
        placements = draw.choice([(Shard(0), other), (other, Replicate()), (Replicate(), Shard(0))])
        whole, seen = torch.arange(prod(shape)).reshape(shape), []
        for coordinate in product(*map(range, mesh)):
            sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
            part = whole
            for dim in range(len(shape)):
                part = part.narrow(dim, offsets[dim], sizes[dim])
            block = Block.of_shard(shape, offsets, sizes)
            assert indices(block) == part.flatten().tolist(), (shape, mesh, coordinate, placements)
            assert block.is_whole == (sizes == shape)
            seen += indices(block)
        assert set(seen) == set(range(prod(shape)))


def test_a_whole_parameter_is_a_block_of_itself() -> None:
    for shape in ((), (0,), (7,), (3, 5), (0, 4), (2, 3, 4)):
        tensor = torch.empty(shape)
        assert Block.of_whole(tensor).span == span_of(tensor)
        assert Block.of_whole(tensor).is_whole


def rows(size: int, mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: Any) -> list[int]:
    """What torch makes of a dimension, sharded from left to right."""
    part = torch.arange(size)
    for placement, pieces, position in zip(placements, mesh, coordinate, strict=True):
        part = placement._split_tensor(part, pieces, with_padding=False, contiguous=True)[0][position]
    found: list[int] = part.tolist()
    return found


@pytest.mark.parametrize(
    "placements",
    [
        (_StridedShard(0, split_factor=2), Shard(0)),
        (_StridedShard(0, split_factor=3), Shard(0)),
        (Shard(0), _StridedShard(0, split_factor=2)),
        (Shard(0), _StridedShard(0, split_factor=1)),
        (Shard(0), Shard(0)),
    ],
    ids=str,
)
def test_parts_that_are_consecutive(placements: tuple[Placement, ...]) -> None:
    verdicts = set()
    for size, mesh in product(range(1, 14), [(2, 2), (2, 3), (1, 2), (3, 2)]):
        parts = [rows(size, mesh, coordinate, placements) for coordinate in product(*map(range, mesh))]
        expected = all(part == list(range(part[0], part[0] + len(part))) for part in parts if part)
        of_mesh: Any = SimpleNamespace(shape=mesh)
        assert _is_consecutive(torch.Size([size]), of_mesh, placements, 0) == expected, (size, mesh, parts)
        verdicts.add(expected)
    assert True in verdicts


SHAPE, RANK = (6, 4, 3), 2
CUTS = [((0, 2), (2, 6)), ((0, 1), (1, 4)), ((0, 3),)]
Move = Callable[[Parameters], None]


def block_parameters(theta: Tensor, block: Block, residual: Tensor) -> Parameters:
    part, lower = theta, residual
    for dim, (offset, size) in enumerate(zip(block.offsets, block.sizes, strict=True)):
        part, lower = part.narrow(dim, offset, size), lower.narrow(dim, offset, size)
    part, lower = part.clone(memory_format=torch.contiguous_format), lower.contiguous().clone()
    return Parameters(
        (part,), (3,), (block,), ("theta",), (part.data_ptr(),), (theta,), Rounding.RESIDUAL, (lower,)
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("verb", ["axpy", "adam"])
def test_blocks_of_tensors_whose_directions_have_factors(side: str, verb: str) -> None:
    """The factor that is drawn, and the one that is given, are those of the whole matrix, on either side."""
    generator = torch.Generator().manual_seed(2)
    theta = torch.randn(SHAPE, generator=generator).bfloat16()
    residual = torch.randint(-127, 127, SHAPE, dtype=torch.int8, generator=generator)
    length = SHAPE[0] if side == "left" else prod(SHAPE[1:])
    frame = Frame(**{side: {3: torch.randn(RANK, length, generator=generator)}})
    terms = [Terms(torch.tensor([5, -6]), torch.tensor([0.1, 0.2]), frame) for _ in range(3)]

    def move(parameters: Parameters) -> list[Tensor]:
        direction = LowRank() if side == "right" else ActivationSubspace()
        if verb == "axpy":
            direction.axpy_(parameters, terms, torch.tensor([0.1, 0.2, 0.3]))
        else:
            window = Window(terms, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.3, 0.2, 0.1]))
            direction.window_(parameters, window, Rule.ADAM, *torch.tensor([0.01, 1e-3, 0.1]))
        return [*parameters.tensors, *parameters.residuals]

    whole = move(block_parameters(theta, Block.of_whole(theta), residual))
    for cuts in product(*CUTS):
        begins, sizes = zip(*((begin, end - begin) for begin, end in cuts), strict=True)
        parts = move(block_parameters(theta, Block.of_shard(SHAPE, begins, sizes), residual))
        for moved, expected in zip(parts, whole, strict=True):
            for dim, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
                expected = expected.narrow(dim, begin, size)
            assert same(moved, expected.contiguous()), cuts
