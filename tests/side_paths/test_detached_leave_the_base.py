"""``detach_side_paths`` leaves a model as it was before ``attach_side_paths``, with its flags and hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import zoext
from support.side_paths import model


def flags(built: nn.Module) -> dict[str, bool]:
    return {name: each.requires_grad for name, each in built.named_parameters()}


def hooks(built: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_hooks_with_kwargs) for each in built.modules())


def some_frozen() -> nn.Module:
    built = model()
    built.first.bias.requires_grad_(False)
    return built


@pytest.mark.parametrize("times", [1, 2])
def test_what_trained_trains_again(times: int) -> None:
    built = some_frozen()
    before = flags(built)
    for _ in range(times):
        zoext.attach_side_paths(built, names=["first"])
        zoext.attach_side_paths(built, names=["head", "packed"])
        assert sum(flags(built).values()) == 3
        zoext.detach_side_paths(built)
        assert flags(built) == before
        assert hooks(built) == 0


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = some_frozen()
        self.other = nn.Linear(2, 3)


MODELS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "of a copy": (lambda outer: outer, copy.deepcopy),
    "of a model around it": (lambda outer: outer.inner, lambda outer: outer),
    "of a part": (lambda outer: outer, lambda outer: outer.inner),
    "of a layer": (lambda outer: outer, lambda outer: outer.inner.head),
    "of what is around a layer": (lambda outer: outer.inner.head, lambda outer: outer),
}


@pytest.mark.parametrize("case", MODELS)
def test_in_another_model(case: str) -> None:
    outer = Outer()
    attached_to, detached_from = MODELS[case]
    target = detached_from(outer)
    before = flags(target)
    zoext.attach_side_paths(attached_to(outer))
    target = detached_from(outer)
    assert not any(flag for name, flag in flags(target).items() if "head" in name and "path" not in name)
    zoext.detach_side_paths(target)
    assert flags(target) == before


def test_a_tied_weight_trains_again() -> None:
    built = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    built[1].weight = built[0].weight
    zoext.attach_side_paths(built)
    head = nn.Sequential(built[1])
    zoext.detach_side_paths(built)
    assert flags(head) == {"0.weight": True}


def test_a_closure_that_fails_leaves_the_first_paths() -> None:
    built = some_frozen()
    before = flags(built)
    zoext.attach_side_paths(built, names="first")
    between = flags(built)
    with pytest.raises(ZeroDivisionError):
        zoext.attach_side_paths(built, names="head", closure=lambda: 1 / 0)
    assert flags(built) == between
    zoext.detach_side_paths(built)
    assert flags(built) == before


def test_held_steps_are_in_the_paths() -> None:
    """Of ``LOZO(defer=True)``, which has none of them written yet."""
    found = []
    for merges in (True, False):
        built = model()
        paths = zoext.attach_side_paths(built, 3)
        optimizer = zoext.LOZO(built, lr=0.1, rank=1, defer=True, probe="streamed")
        for _ in range(3):
            optimizer.step(lambda built=built: built(torch.ones(2, 3, 7)).square().mean())
        if merges:
            optimizer.merge()
        assert merges == bool(paths["head"].up.weight.any())
        found.append([path.up.weight for path in zoext.detach_side_paths(built).values()])
        assert optimizer.engine.deferral.is_empty
    assert all(map(torch.equal, *found))
