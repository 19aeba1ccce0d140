"""Whether weights are those that a recorded run began with, and the optimizer that goes on from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from zoext import noise, probes
from zoext._engine.axes import Axes
from zoext._parameters import parameters, wrappers
from zoext._parameters.precision import RESIDUAL, rounding_of
from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory.fields import TrajectoryError, shown
from zoext.trajectory.header import Header, RecordedParameter, named_groups

Groups = list[list[Tensor]]
Difference = Callable[[RecordedParameter, Tensor], str | None]


def find(header: Header, model: nn.Module, path: Path) -> Groups:
    """The parameters of ``model`` that the run had, in its groups.

    Raises:
        TrajectoryError: for a model that is not the one of the run.
    """
    # With the names that a wrapper gives them too: an optimizer of named parameters knows no others.
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(wrappers.named_parameters(model))}
    missing = [parameter.name for parameter in header.parameters if parameter.name not in named]
    if missing:
        raise TrajectoryError(
            f"{path}: is of another model: {shown(missing[0])} ({len(missing)} of {len(header.parameters)} "
            "parameters) is not in this one; give the model of the run, or an optimizer of its parameters"
        )
    groups = [[named[parameter.name] for parameter in group] for group in header.groups]
    _check(header, groups, path, RecordedParameter.unlike, "another model")
    return groups


def check_optimizer(header: Header, optimizer: ZerothOrderOptimizer, path: Path) -> None:
    """Raises a TrajectoryError unless ``optimizer`` is where the run of ``header`` was when it began."""
    first = optimizer.param_groups[0]
    ours = {name: first[name] for name in ("recipe", "precision", "step")}
    for name, value in (ours | {"seed": noise.signed(first["seed"]) % 2**64}).items():
        if value != getattr(header, name):
            raise TrajectoryError(
                f"{path}: its {name} is {str(getattr(header, name))[:500]}, the optimizer has {value}; give "
                "a new optimizer that was built as the run's was"
            )
    if remembers(optimizer):
        raise TrajectoryError(
            f"{path}: begins with an optimizer that remembers no steps, and this one does; give a new one"
        )
    groups = [[tensor for _, _, tensor in group] for group in named_groups(optimizer)]
    if [len(group) for group in groups] != [len(group) for group in header.groups]:
        raise TrajectoryError(f"{path}: is of other groups of parameters than the optimizer has")
    _check(header, groups, path, RecordedParameter.unlike, "another model")


def remembers(optimizer: ZerothOrderOptimizer) -> bool:
    """Whether the next step depends on more than the weights and the step number."""
    residuals = (state[RESIDUAL] for state in optimizer.state.values() if RESIDUAL in state)
    return any(group["update_state"] for group in optimizer.param_groups) or any(map(Tensor.any, residuals))


def check_weights(header: Header, groups: Groups, path: Path) -> None:
    """Raises a TrajectoryError for weights that the run did not begin with. A collective for DTensors."""
    _check(header, groups, path, RecordedParameter.changed, "other weights")


def _check(header: Header, groups: Groups, path: Path, check: Difference, what: str) -> None:
    pairs: list[tuple[RecordedParameter, Tensor]] = []
    for recorded, tensors in zip(header.groups, groups, strict=True):
        pairs += zip(recorded, tensors, strict=True)
    different = [
        (parameter.name, reason) for parameter, tensor in pairs if (reason := check(parameter, tensor))
    ]
    if different:
        name, reason = different[0]
        raise TrajectoryError(
            f"{path}: begins with {what}: {name} {reason} ({len(different)} of {len(pairs)} "
            "parameters differ); load what the run began with"
        )


def optimizer_of(header: Header, model: nn.Module, groups: Groups, path: Path) -> ZerothOrderOptimizer:
    """The run's optimizer, on the parameters that were found in ``model``."""
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
            probe=probes.InplaceProbe() if probes.is_compiled(model) else probes.StreamedProbe(model),
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
    """Raises a TrajectoryError if one of these parameters is of a kind that cannot be moved."""
    flat = [tensor for group in groups for tensor in group]
    for key in sorted(keys):
        name = header.parameters[key].name
        if flat[key].dtype not in noise.FLOATING:
            raise TrajectoryError(f"{path}: moves {shown(name)}, which has dtype {flat[key].dtype}")
        if not header.parameters[key].digest:
            raise TrajectoryError(f"{path}: moves {shown(name)}, of whose weights its header has no digest")
        with moving([[flat[key]]], [0]):
            try:
                parameters.check(flat[key], name)
            except (ValueError, TypeError) as error:
                raise TrajectoryError(f"{path}: {str(error)[:500]}") from None


def let_move(groups: Groups, keys: Collection[int]) -> None:
    """Has the parameters with these keys require grad, and no others."""
    moving = frozenset(keys)
    flat = (tensor for group in groups for tensor in group)
    for key, tensor in enumerate(flat):
        if tensor.requires_grad != (key in moving):
            tensor.requires_grad_(key in moving)


@contextmanager
def moving(groups: Groups, keys: Collection[int]) -> Iterator[None]:
    """Within the block just these parameters require grad."""
    before = [tensor.requires_grad for group in groups for tensor in group]
    try:
        let_move(groups, keys)
        yield
    finally:
        let_move(groups, [key for key, moved in enumerate(before) if moved])
