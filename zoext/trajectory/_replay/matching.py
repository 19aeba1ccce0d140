"""Finds the parameters of a recorded run in a model or an optimizer, and checks that they match."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from zoext import noise, probes
from zoext._engine import Axes
from zoext._parameters import parameters, wrappers
from zoext._parameters.precision import rounding_of
from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory import _optimizers
from zoext.trajectory._format.fields import TrajectoryError, shown
from zoext.trajectory._format.header import Header, RecordedParameter

Groups = list[list[Tensor]]
Mismatch = Callable[[RecordedParameter, Tensor], str | None]


def find(header: Header, model: nn.Module, path: Path) -> Groups:
    """The parameters of the run in ``model``, in the groups of the run.

    Raises:
        TrajectoryError: if one is missing or has another shape or dtype.
    """
    # Also by the names inside wrappers: an optimizer of named parameters records no others.
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(wrappers.named_parameters(model))}
    missing = [parameter.name for parameter in header.parameters if parameter.name not in named]
    if missing:
        raise TrajectoryError(
            f"{path}: model mismatch: {shown(missing[0])} ({len(missing)} of {len(header.parameters)} "
            "parameters) is not in this model; give the model of the run, or an optimizer of its parameters"
        )
    groups = [[named[parameter.name] for parameter in group] for group in header.groups]
    _check(header, groups, path, RecordedParameter.shape_mismatch, "model mismatch")
    return groups


def check_optimizer(header: Header, optimizer: ZerothOrderOptimizer, path: Path) -> None:
    """Raises a TrajectoryError unless ``optimizer`` is in the state where the recording began."""
    first = optimizer.param_groups[0]
    ours = {name: first[name] for name in ("recipe", "precision", "step")}
    for name, value in (ours | {"seed": _optimizers.unsigned_seed(optimizer)}).items():
        if value != getattr(header, name):
            raise TrajectoryError(
                f"{path}: run mismatch: its {name} is {str(getattr(header, name))[:500]}, but the optimizer "
                f"has {value}; give a new optimizer with the options of the run"
            )
    if _optimizers.remembers(optimizer):
        raise TrajectoryError(
            f"{path}: begins with a new optimizer, but the next step of this one depends on its earlier "
            "steps; give a new one"
        )
    groups = [[tensor for _, _, tensor in group] for group in _optimizers.named_groups(optimizer)]
    if [len(group) for group in groups] != [len(group) for group in header.groups]:
        raise TrajectoryError(
            f"{path}: model mismatch: the run had parameter groups of {_sizes(header.groups)} parameters, "
            f"the optimizer has {_sizes(groups)}; give an optimizer with the groups of the run"
        )
    _check(header, groups, path, RecordedParameter.shape_mismatch, "model mismatch")


def _sizes(groups: Collection[Collection[object]]) -> str:
    return shown([len(group) for group in groups])


def check_weights(header: Header, groups: Groups, path: Path) -> None:
    """Raises a TrajectoryError unless the weights are those that the run began with.

    It is a collective for DTensors.
    """
    _check(header, groups, path, RecordedParameter.weights_mismatch, "weights mismatch")


def _check(header: Header, groups: Groups, path: Path, mismatch: Mismatch, what: str) -> None:
    pairs: list[tuple[RecordedParameter, Tensor]] = []
    for recorded, tensors in zip(header.groups, groups, strict=True):
        pairs += zip(recorded, tensors, strict=True)
    different = [
        (parameter.name, reason) for parameter, tensor in pairs if (reason := mismatch(parameter, tensor))
    ]
    if different:
        name, reason = different[0]
        raise TrajectoryError(
            f"{path}: {what}: {name} {reason} ({len(different)} of {len(pairs)} parameters differ); load "
            "what the run began with"
        )


def optimizer_of(
    header: Header, model: nn.Module, groups: Groups, path: Path, probe: str | probes.Probe
) -> ZerothOrderOptimizer:
    """The optimizer of the run, for the parameters that ``find`` returned."""
    chosen = probes.choose(probe, model)
    names = [[parameter.name for parameter in group] for group in header.groups]
    try:
        axes = Axes.from_recipe(header.recipe)
        rounding_of(header.precision)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise TrajectoryError(f"{path}: line 1: {str(error)[:500]}") from None
    try:
        optimizer = ZerothOrderOptimizer(
            [{"params": list(zip(*group, strict=True))} for group in zip(names, groups, strict=True)],
            **axes._asdict(),
            seed=header.seed,
            precision=header.precision,
            probe=chosen,
        )
    except (ValueError, TypeError) as error:
        raise TrajectoryError(f"{path}: {str(error)[:500]}") from None
    for group in optimizer.param_groups:
        group["step"] = header.step
    return optimizer


def movable(groups: Groups) -> list[int]:
    """The keys of the parameters that require grad."""
    flat = (tensor for group in groups for tensor in group)
    return [key for key, tensor in enumerate(flat) if tensor.requires_grad]


def check_movable(header: Header, groups: Groups, keys: Collection[int], path: Path) -> None:
    """Raises a TrajectoryError if the optimizer cannot move one of the parameters with these keys."""
    flat = [tensor for group in groups for tensor in group]
    for key in sorted(keys):
        name = header.parameters[key].name
        if flat[key].dtype not in noise.FLOATING:
            raise TrajectoryError(f"{path}: moves {shown(name)}, which has dtype {flat[key].dtype}")
        if not header.parameters[key].digest:
            raise TrajectoryError(f"{path}: moves {shown(name)}, but its header has no digest of the weights")
        with moving([[flat[key]]], [0]):
            try:
                parameters.check(flat[key], name)
            except (ValueError, TypeError) as error:
                raise TrajectoryError(f"{path}: {str(error)[:500]}") from None


def let_move(groups: Groups, keys: Collection[int]) -> None:
    """Makes the parameters with these keys, and no others, require grad."""
    moving = frozenset(keys)
    flat = (tensor for group in groups for tensor in group)
    for key, tensor in enumerate(flat):
        if tensor.requires_grad != (key in moving):
            tensor.requires_grad_(key in moving)


@contextmanager
def moving(groups: Groups, keys: Collection[int]) -> Iterator[None]:
    """A block in which only the parameters with these keys require grad."""
    before = [tensor.requires_grad for group in groups for tensor in group]
    try:
        let_move(groups, keys)
        yield
    finally:
        let_move(groups, [key for key, moved in enumerate(before) if moved])
