"""Recordings of runs on two ranks: the cases of ``test_recorded_on_ranks``."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zoext
from support.graphed_runs import RECIPES, same
from support.ranks import Case, run_cases
from support.sharded_replays import KINDS, gathered
from support.sharded_runs import given_losses, loss_of, model_of

RANKS, STEPS = 2, 5
SETTINGS: dict[str, Any] = {"lr": 3e-3, "mu": 1e-2, "weight_decay": 0.1, "seed": 5}
FOLDER = Path(sys.argv[-1])

Closures = Callable[[int], Callable[[], Any]]


class Launch(NamedTuple):
    """How two ranks share a run, and what has the same losses on one process."""

    spread: Callable[[nn.Module], object]
    options: Callable[[], dict[str, Any]]
    closures: Callable[[nn.Module, int], Closures]
    alone: Callable[[nn.Module], Closures]
    probe: str = "streamed"


def over_columns(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})


def same_batch(model: nn.Module, rank: int = 0) -> Closures:
    return lambda step: lambda: loss_of(model, step)


def own_batch(model: nn.Module, rank: int) -> Closures:
    return lambda step: lambda: loss_of(model, 2 * step + rank)


def both_batches(model: nn.Module) -> Closures:
    def loss(step: int) -> Tensor:
        return torch.stack([loss_of(model, 2 * step + rank).double() for rank in range(2)]).mean().float()

    return lambda step: lambda: loss(step)


def numbers(model: nn.Module, rank: int = 0) -> Closures:
    losses: Iterator[float] = given_losses()
    return lambda step: lambda: next(losses)


LAUNCHES = {
    "data": Launch(lambda model: None, dict, own_batch, both_batches),
    "probes": Launch(
        lambda model: None, lambda: {"probe_group": distributed.group.WORLD}, same_batch, same_batch
    ),
    "FSDP2": Launch(fully_shard, dict, same_batch, same_batch, "inplace"),
    "tensor parallel": Launch(over_columns, dict, numbers, numbers, "inplace"),
}


class Run:
    """A run on two ranks, and its steps."""

    def __init__(self, launch: str, recipe: str, kind: str, rank: int, **options: Any) -> None:
        how = LAUNCHES[launch]
        self.model = model_of(KINDS[kind][0])
        how.spread(self.model)
        self.optimizer = built(how, recipe, kind, self.model, **{**how.options(), **options})
        self._closures = how.closures(self.model, rank)

    def steps(self, steps: range) -> None:
        for step in steps:
            self.optimizer.step(self._closures(step))


def built(how: Launch, recipe: str, kind: str, model: nn.Module, **options: Any) -> Any:
    settings = {**SETTINGS, "probe": how.probe, "precision": KINDS[kind][1], **options}
    return RECIPES[recipe](model, **settings)


def path_of(name: str, rank: int) -> Path:
    """Another file on each rank, so that a second writer would be seen."""
    return FOLDER / f"{name}-{rank}.jsonl"


def recorded_alone(launch: str, recipe: str, kind: str, path: Path, **options: Any) -> nn.Module:
    how, model = LAUNCHES[launch], model_of(KINDS[kind][0])
    closures = how.alone(model)
    optimizer = built(how, recipe, kind, model, **options)
    with zoext.Trajectory(path, optimizer, frames=True):
        for step in range(STEPS):
            optimizer.step(closures(step))
    return model


def is_recorded_as_on_one_process(launch: str, recipe: str, kind: str, rank: int) -> None:
    name = f"{launch} {recipe} {kind}"
    run = Run(launch, recipe, kind, rank)
    path = path_of(name, rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with zoext.Trajectory(path, run.optimizer, frames=True):
            run.steps(range(STEPS))
    is_exact = LAUNCHES[launch].probe == "streamed"
    assert len([each for each in caught if "restores the weights" in str(each.message)]) == (
        0 if is_exact or rank else 1
    )
    assert path.exists() == (rank == 0)
    weights = gathered(run.model)
    distributed.barrier()
    alone, sharded = model_of(KINDS[kind][0]), model_of(KINDS[kind][0])
    zoext.replay(alone, path_of(name, 0))
    LAUNCHES[launch].spread(sharded)
    zoext.replay(sharded, path_of(name, 0))
    assert same(gathered(sharded), gathered(alone))
    if is_exact:
        assert same(gathered(alone), weights)
    else:  # probes in place restore weights to rounding
        for key, weight in gathered(alone).items():
            eps = torch.finfo(weight.dtype).eps
            torch.testing.assert_close(weight, weights[key], rtol=16 * eps, atol=16 * eps)
    assert not same(weights, gathered(model_of(KINDS[kind][0])))
    # A basis is found from the batches of all ranks, here equal ones, in the same way.
    merges = recipe == "agzo" and launch == "FSDP2"
    other = FOLDER / f"{name} alone.jsonl"
    if merges or rank == 0:
        options = {} if merges else {"process_group": None}
        assert same(gathered(recorded_alone(launch, recipe, kind, other, **options)), weights)
    if rank == 0:
        assert path.read_bytes() == other.read_bytes()
        frames = path.with_suffix(".frames")
        assert frames.exists() == (recipe == "agzo")
        if frames.exists():
            assert frames.read_bytes() == other.with_suffix(".frames").read_bytes()


def is_continued(launch: str, at: int, rank: int) -> None:
    """From a checkpoint; the bytes are those of an undisturbed recording."""
    recipe, kind = ("agzo", "residual") if launch == "FSDP2" else ("adamezo", "float32")
    whole, path = path_of(f"whole {launch} {at}", rank), path_of(f"parts {launch} {at}", rank)
    run = Run(launch, recipe, kind, rank)
    with zoext.Trajectory(whole, run.optimizer, frames=True):
        run.steps(range(STEPS))
    run = Run(launch, recipe, kind, rank)
    with zoext.Trajectory(path, run.optimizer, frames=True):
        run.steps(range(at))
        saved, weights = copy.deepcopy(run.optimizer.state_dict()), local_copies(run.model)
        run.steps(range(at, STEPS - 1))
    again = Run(launch, recipe, kind, rank)
    put(again.model, weights)
    again.optimizer.load_state_dict(saved)
    with zoext.Trajectory(path, again.optimizer, frames=True, resume=True):
        again.steps(range(at, STEPS))
    assert same(gathered(again.model), gathered(run_to_end(run, STEPS - 1)))
    if rank == 0:
        for suffix in (".jsonl", ".frames") if recipe == "agzo" else (".jsonl",):
            assert path.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
    else:
        assert not path.exists()


def run_to_end(run: Run, done: int) -> nn.Module:
    run.steps(range(done, STEPS))
    return run.model


@torch.no_grad()
def local_copies(model: nn.Module) -> list[Tensor]:
    parts = (getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters())
    return [part.detach().clone() for part in parts]


@torch.no_grad()
def put(model: nn.Module, parts: list[Tensor]) -> None:
    for parameter, part in zip(model.parameters(), parts, strict=True):
        getattr(parameter, "_local_tensor", parameter).copy_(part)


@contextmanager
def refused(model: nn.Module, kind: type[Exception], pattern: str, *, exact: bool = True) -> Iterator[None]:
    """The block raises this, and leaves the weights as they are; to rounding, if probes are in place."""
    before = local_copies(model)
    with pytest.raises(kind, match=pattern):
        yield
    if exact:
        assert same(local_copies(model), before)
    else:
        torch.testing.assert_close(local_copies(model), before, rtol=1e-6, atol=1e-6)


def a_file_that_exists(launch: str, rank: int) -> None:
    path = path_of(f"exists {launch}", 0)
    run = Run(launch, "mezo", "float32", rank)
    if rank == 0:
        path.write_text("mine")
    kind, pattern = (
        (FileExistsError, "exists") if rank == 0 else (zoext.TrajectoryError, "another rank refus")
    )
    with refused(run.model, kind, pattern):
        zoext.Trajectory(path, run.optimizer)
    assert run.optimizer.recorder is None
    run.steps(range(1))
    distributed.barrier()
    assert path.read_text() == "mine"


def other_weights_than_at_the_beginning(rank: int) -> None:
    """One element on the rank that does not write."""
    path = path_of("other weights", 0)
    run = Run("FSDP2", "mezo", "float32", rank)
    zoext.Trajectory(path, run.optimizer).close()
    if rank == 1:
        with torch.no_grad():
            next(run.model.parameters()).to_local()[0, 0] += 1
    pattern = (
        "has other weights than the run had at step 0" if rank == 0 else "another rank refused to record"
    )
    with refused(run.model, zoext.TrajectoryError, pattern):
        zoext.Trajectory(path, run.optimizer, resume=True)


def a_file_that_cannot_be_written(launch: str, how: str, rank: int) -> None:
    """The step raises on all ranks and moves no weight; once the file is back, all go on without a loss."""
    name = f"moved {launch} {how}"
    path, run = path_of(name, rank), Run(launch, "mezo", "float32", rank)
    trajectory = zoext.Trajectory(path, run.optimizer)
    run.steps(range(2))
    away = path.with_suffix(".away")
    if rank == 0:
        trajectory.flush()
        path.rename(away)
    run.steps(range(2, 3))
    if rank == 0:
        with pytest.raises(OSError, match="was moved"):
            trajectory.flush()
    kind, pattern = (OSError, "no weight was moved") if rank == 0 else (RuntimeError, "could not be recorded")
    is_exact = LAUNCHES[launch].probe == "streamed"
    with refused(run.model, kind, pattern, exact=is_exact):
        take(how, run)
    assert run.optimizer.param_groups[0]["step"] == 3
    if rank == 0:
        away.rename(path)
    if how == "ask":
        run.optimizer.cancel()
    run.steps(range(3, STEPS))
    trajectory.close()
    distributed.barrier()
    replayed = model_of(torch.float32)
    optimizer = zoext.replay(replayed, path_of(name, 0))
    assert optimizer.param_groups[0]["step"] == STEPS
    weights = gathered(run.model)
    if is_exact:
        assert same(gathered(replayed), weights)
    else:
        torch.testing.assert_close(gathered(replayed), weights, rtol=1e-5, atol=1e-5)


def take(how: str, run: Run) -> None:
    if how == "step":
        run.steps(range(3, 4))
        return
    asked = run.optimizer.ask()
    run.optimizer.tell([1.0] * len(asked))


def ranks_that_record_different_runs(rank: int) -> None:
    run = Run("data", "mezo", "float32", rank, seed=rank)
    with refused(run.model, zoext.TrajectoryError, "the ranks record different runs.*same recipe, seed"):
        zoext.Trajectory(path_of("different", rank), run.optimizer)
    assert not path_of("different", rank).exists()


def ranks_that_could_not_tell_each_other(rank: int) -> None:
    run = Run("tensor parallel", "mezo", "float32", rank, process_group=None)
    with refused(run.model, ValueError, "process_group: some ranks that hold parts .*process_group='auto'"):
        zoext.Trajectory(path_of("untold", rank), run.optimizer)


def independent_runs(rank: int) -> None:
    """Each process records its own."""
    run = Run("data", "mezo", "float32", rank, process_group=None, seed=rank)
    with zoext.Trajectory(path_of("independent", rank), run.optimizer):
        run.steps(range(STEPS))
    model = model_of(torch.float32)
    zoext.replay(model, path_of("independent", rank))
    assert same(gathered(model), gathered(run.model))


def runs() -> Iterator[tuple[str, str, str]]:
    recipes = ("mezo", "adamezo", "agzo", "greedy", "adam over lozo")
    for number, recipe in enumerate(recipes):
        for launch in LAUNCHES:
            if recipe != "agzo" or launch in ("probes", "FSDP2"):  # whose basis is that of one batch
                yield launch, recipe, list(KINDS)[number % 3]


CASES: dict[str, Case] = {
    f"{launch}: {recipe} {kind}": partial(is_recorded_as_on_one_process, launch, recipe, kind)
    for launch, recipe, kind in runs()
}
CASES |= {
    f"continued, {launch} at {at}": partial(is_continued, launch, at)
    for launch in ("data", "FSDP2")
    for at in (0, 3)
}
CASES |= {f"exists, {launch}": partial(a_file_that_exists, launch) for launch in LAUNCHES}
CASES |= {
    f"cannot be written, {launch}, {how}": partial(a_file_that_cannot_be_written, launch, how)
    for launch, how in (("data", "step"), ("probes", "step"), ("FSDP2", "step"), ("data", "ask"))
}
CASES |= {
    act.__name__: act
    for act in (
        other_weights_than_at_the_beginning,
        ranks_that_record_different_runs,
        ranks_that_could_not_tell_each_other,
        independent_runs,
    )
}

if __name__ == "__main__":
    sys.exit(run_cases(CASES, RANKS))
