"""The inputs and outputs of a captured step; the host fills the inputs before each replay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoext._engine import AppliedStep, StepEngine, StepSeeds
from zoext.directions import Frame
from zoext.estimators import Estimate
from zoext.graphs._cuda_graph import CudaGraph
from zoext.updates import State

_PLAIN = {int, float, bool, str, type(None)}


class Inputs(NamedTuple):
    """The memory from which a graph reads the values that the host sets before every step."""

    seeds: StepSeeds
    lrs: list[Tensor]
    states: list[State]

    @classmethod
    def of(cls, engine: StepEngine) -> Inputs:
        groups = engine.param_groups
        device = next(group.device for group in engine.groups if len(group))
        return cls(
            StepSeeds.empty(engine.axes.estimator.draws, device),
            # A float becomes a float64, so that its product with the weight decay is rounded in the same way.
            [torch.empty((), dtype=lr_dtype(group), device=device) for group in groups],
            [map_tensors(torch.empty_like, group["update_state"]) for group in groups],
        )

    def fill(self, engine: StepEngine) -> None:
        engine.fill_seeds(self.seeds)
        for lr, group in zip(self.lrs, engine.param_groups, strict=True):
            lr.fill_(group["lr"])
        states = [group["update_state"] for group in engine.param_groups]
        if tensors := tensors_of(self.states):
            torch._foreach_copy_(tensors, tensors_of(states))


class CapturedStep(NamedTuple):
    graph: CudaGraph
    inputs: Inputs
    step: AppliedStep
    states: list[State]
    memory: list[Tensor]  # owned by the probe, but read and written by the graph

    def results(self, engine: StepEngine) -> tuple[AppliedStep, list[State]]:
        """The step and the new states of a replay, in memory that the next replay does not overwrite."""
        before = tensors_of([group["update_state"] for group in engine.param_groups])
        kept = {id(place): value for place, value in zip(tensors_of(self.inputs.states), before, strict=True)}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                kept[id(tensor)] = tensor.clone()
            return kept[id(tensor)]

        estimate = self.step.estimate
        fields = {field.name: getattr(estimate, field.name) for field in dataclasses.fields(Estimate)}
        # A frame is large. Only a recorder reads it, and only if it cannot be drawn from seeds.
        is_read = engine.run.recorder is not None and engine.axes.direction.watches
        known = self.step.frame if is_read else Frame()
        left, right = (map_tensors(keep, dict(factors)) for factors in (known.left, known.right))
        frame = Frame(left, right, known.unused)
        step = AppliedStep(Estimate(**map_tensors(keep, fields)), frame, engine.options())
        return step, map_tensors(keep, self.states)


def lr_dtype(group: dict[str, Any]) -> torch.dtype:
    """The dtype in which a graph holds the learning rate of a group."""
    lr = group["lr"]
    return lr.dtype if isinstance(lr, Tensor) else torch.float64


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Applies ``function`` to every tensor in plain data.

    Not ``tree_map``, which would visit each of the hundreds of keys in the state of an update.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        if _PLAIN.issuperset(map(type, value)):
            return value
        entries = [map_tensors(function, entry) for entry in value]
        return tuple(entries) if isinstance(value, tuple) else entries
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in plain data, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found
