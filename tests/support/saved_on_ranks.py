"""Runs that are saved with ``torch.distributed.checkpoint`` on three ranks, and continued on others.

``python -m support.saved_on_ranks FOLDER`` goes through all cases on three ranks, then on two, then on one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zoext
from support.graphed_runs import RECIPES, same
from support.ranks import Case, run_cases
from support.sharded_replays import KINDS, gathered
from support.sharded_runs import loss_of, model_of

SAVED_ON, LOADED_ON = 3, (2, 1)
BEFORE, STEPS = 4, 7
SETTINGS: dict[str, Any] = {"lr": 3e-3, "mu": 1e-2, "weight_decay": 0.1, "seed": 5}
FOLDER = Path(sys.argv[-1])


class Wide(nn.Module):
    """A layer whose parameters have no residual, since they are float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.float()

    def forward(self, x: Tensor) -> Tensor:
        wide: Tensor = self.layer(x.float())
        return wide.to(x.dtype)


Spread = Callable[[nn.Module, int], object]


def whole(model: nn.Module, ranks: int) -> None:
    """The whole model on each rank."""


def gathering(model: nn.Module, ranks: int) -> None:
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, ranks: int) -> None:
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})


SPREADS: dict[str, Spread] = {"FSDP2": gathering, "tensor parallel": tensor_parallel, "whole": whole}


def model_with(spread: str, kind: str, ranks: int) -> nn.Module:
    dtype, _ = KINDS[kind]
    model = model_of(dtype)
    if kind == "residual":
        model[2] = Wide(model[2])
    SPREADS[spread](model, ranks)
    return model


def optimizer_of(recipe: str, kind: str, model: nn.Module, **options: Any) -> zoext.ZerothOrderOptimizer:
    settings = {**SETTINGS, "precision": KINDS[kind][1], "probe": "inplace", **options}
    return RECIPES[recipe](model, **settings)


def steps(spread: str, model: nn.Module, optimizer: zoext.ZerothOrderOptimizer, which: range) -> None:
    """Whose losses do not depend on the number of ranks; AGZO sees a forward."""
    for step in which:
        numbers = iter(range(100))

        def closure(step: int = step, numbers: Iterator[int] = numbers) -> Tensor | float:
            if spread != "tensor parallel":
                loss_of(model, step)
            return 1.0 + 0.01 * ((7 * next(numbers) + step) % 11)

        optimizer.step(closure)


def checkpoint_of(name: str) -> str:
    return str(FOLDER / name.replace(":", ""))


def is_saved(name: str, spread: str, recipe: str, kind: str, rank: int) -> None:
    """And the end of the undisturbed run."""
    model = model_with(spread, kind, SAVED_ON)
    optimizer = optimizer_of(recipe, kind, model)
    steps(spread, model, optimizer, range(BEFORE))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=checkpoint_of(name))
    saved = gathered(model)
    steps(spread, model, optimizer, range(BEFORE, STEPS))
    end = gathered(model)
    if rank == 0:
        torch.save({"saved": saved, "end": end}, checkpoint_of(name) + ".pt")


def is_continued(ranks: int, name: str, spread: str, recipe: str, kind: str, rank: int) -> None:
    model = model_with(spread, kind, ranks)
    optimizer = optimizer_of(recipe, kind, model, lr=0.5, seed=1)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=checkpoint_of(name))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert optimizer.param_groups[0]["step"] == BEFORE
    for parameter, own in optimizer.state.items():
        if parameter.dtype == torch.bfloat16:
            assert isinstance(parameter, DTensor) == isinstance(own["residual"], DTensor)
            assert own["residual"].shape == parameter.shape
    expected = torch.load(checkpoint_of(name) + ".pt", weights_only=True)
    assert same(gathered(model), expected["saved"])
    steps(spread, model, optimizer, range(BEFORE, STEPS))
    # A basis that is merged from those of another number of batches has other bits.
    assert "agzo" in recipe or same(gathered(model), expected["end"])
    assert not same(gathered(model), expected["saved"])


def has_whole_states(rank: int) -> None:
    """``full_state_dict``: the whole of the state on rank 0, which others get from there."""
    model = model_with("FSDP2", "residual", SAVED_ON)
    optimizer = optimizer_of("adamezo", "residual", model)
    steps("FSDP2", model, optimizer, range(BEFORE))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    if rank == 0:
        alone = model_with("FSDP2", "residual", 1)
        its = optimizer_of("adamezo", "residual", alone, process_group=None, lr=0.5)
        set_state_dict(alone, its, model_state_dict=dict(weights), optim_state_dict=dict(state))
        steps("FSDP2", alone, its, range(BEFORE, STEPS))
    steps("FSDP2", model, optimizer, range(BEFORE, STEPS))
    end = gathered(model)
    if rank == 0:
        assert same(gathered(alone), end)


def refuses_a_residual_that_is_spread_otherwise(rank: int) -> None:
    model, alone = model_with("FSDP2", "residual", SAVED_ON), model_with("FSDP2", "residual", 1)
    optimizer = optimizer_of("mezo", "residual", model)
    other = optimizer_of("mezo", "residual", alone, process_group=None)
    for each, its in ((model, optimizer), (alone, other)):
        steps("FSDP2", each, its, range(1))
    with pytest.raises(
        ValueError, match=r"is whole for a parameter that is sharded.*distributed\.checkpoint"
    ):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"is sharded by .* for a parameter that is whole"):
        other.load_state_dict(optimizer.state_dict())
    distributed.barrier()


def runs() -> Iterator[tuple[str, str, str]]:
    """Every recipe on FSDP2, and one of each family elsewhere."""
    for number, recipe in enumerate(RECIPES):
        yield "FSDP2", recipe, list(KINDS)[number % 3]
    for recipe, kind in (("mezo", "residual"), ("adamezo", "residual"), ("agzo", "residual")):
        yield "FSDP2", recipe, kind
    for recipe, kind in (("adamezo", "residual"), ("adam over lozo", "float32"), ("mezo", "bfloat16")):
        yield "tensor parallel", recipe, kind
    yield "whole", "adam over agzo", "residual"


def named(act: Callable[..., None]) -> dict[str, Case]:
    return {
        name: partial(act, name, *run)
        for run in dict.fromkeys(runs())
        for name in [f"{run[0]}: {run[1]} {run[2]}"]
    }


CASES_BY_RANKS: dict[int, dict[str, Case]] = {SAVED_ON: named(is_saved)}
CASES_BY_RANKS[SAVED_ON] |= {
    act.__name__: act for act in (has_whole_states, refuses_a_residual_that_is_spread_otherwise)
}
CASES_BY_RANKS |= {ranks: named(partial(is_continued, ranks)) for ranks in LOADED_ON}

if __name__ == "__main__":
    for ranks, cases in CASES_BY_RANKS.items():
        folder = FOLDER / str(ranks)
        folder.mkdir()
        if status := run_cases(cases, ranks, folder):
            sys.exit(status)
