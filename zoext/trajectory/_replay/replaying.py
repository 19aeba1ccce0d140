"""Replays recorded runs bit for bit, without forward passes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zoext._parameters import gathering
from zoext.optimizer import ZerothOrderOptimizer, unwrap
from zoext.probes import Probe
from zoext.trajectory._agreement import Agreement
from zoext.trajectory._format.reading import Part, read_until
from zoext.trajectory._replay.part_replay import PartReplay

StrPath = str | os.PathLike[str]


def replay(
    target: nn.Module | torch.optim.Optimizer,
    path: StrPath | Sequence[StrPath],
    *,
    to_step: int | None = None,
    probe: str | Probe = "auto",
) -> ZerothOrderOptimizer:
    """Applies the steps of a recorded run to the weights that it began with, bit for bit, without a forward.

        optimizer = zoext.replay(model, "run.jsonl")
        optimizer = zoext.replay(model, "run.jsonl", to_step=1200, probe="batched")
        zoext.replay(model, ["a.jsonl", "b.jsonl"])

    The device, the number of threads, the instruction set and the sharding may differ from those of the run.
    One pass over the weights applies many steps, each rounded as in the run.

    If the parameters are DTensors, all ranks that hold parts of them must call this function. If one rank
    refuses to replay, all do.

    Args:
        target: the model, with the weights that the run began with. Its parameters are found by name, and
            those that the run did not move are frozen. Or a ``ZerothOrderOptimizer``, or a wrapper of one,
            with the recipe and the parameters of the run, at the step where recording began.
        path: the trajectory. With a sequence of trajectories of runs that began with these weights, their
            changes are added: each trajectory is replayed on the result of the one before.
        to_step: the step of the run to stop after. Default: the last recorded step.
        probe: how the returned optimizer evaluates the closure if training continues: as for
            ``ZerothOrderOptimizer``. A trajectory does not say which probe its run had, and the replay needs
            none. Default "auto".

    Warns:
        UserWarning: for a run with an in-place probe, which the replay approximates but does not reproduce.

    Returns:
        The optimizer of the (last) trajectory in its state after that step. Training can continue with it.

    Raises:
        TrajectoryError: for a trajectory that is corrupted up to ``to_step``, is in another version, or does
            not match the target, and for one of AGZO without its bases. Also if another rank refused or read
            another trajectory. No weight was moved.
        ValueError: for a ``to_step`` outside the trajectory, for a sequence with a ``to_step`` or with an
            optimizer as ``target``, and for a ``probe`` that is unknown, or given beside an optimizer.
        TypeError: for a ``to_step`` that is not an integer, and an optimizer that is not zoext's.
        RuntimeError: for an optimizer whose steps are being recorded.
        OSError: if a file cannot be read.
    """
    paths = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(each) for each in path]
    if len(paths) != 1 and (not paths or to_step is not None or not isinstance(target, nn.Module)):
        raise ValueError(
            "path: several trajectories are replayed whole and on a module; give at least one, a module as "
            "target, and no to_step"
        )
    if to_step is not None and (isinstance(to_step, bool) or not isinstance(to_step, int)):
        raise TypeError(f"to_step must be an integer, not {to_step!r}")
    if probe != "auto" and not isinstance(target, nn.Module):
        raise ValueError(f"probe={probe!r}: the optimizer that is the target has one; leave probe out")
    target = target if isinstance(target, nn.Module) else unwrap(target)
    with Agreement.of_shards(_tensors(target)).reached():
        parts = [read_until(each, to_step) for each in paths]
    return replay_parts(target, parts, probe)


def replay_parts(
    target: nn.Module | torch.optim.Optimizer, parts: Sequence[Part], probe: str | Probe = "auto"
) -> ZerothOrderOptimizer:
    """Like ``replay``, for trajectories that ``read_until`` has read already."""
    target = target if isinstance(target, nn.Module) else unwrap(target)
    agreement = Agreement.of_shards(_tensors(target))
    with agreement.reached(" ".join(part.sha256 for part in parts)):
        replays = [PartReplay(target, part, probe) for part in parts]
    with agreement.reached():
        for each in replays:
            each.check_weights()
    for each in replays:
        each.warn_if_inexact(stacklevel=3)
    for each in replays:
        each.run()
    return replays[-1].optimizer


def _tensors(target: nn.Module | ZerothOrderOptimizer) -> list[Tensor]:
    """The parameters of ``target``, after those that FSDP gathered for a forward were sharded again."""
    module = target if isinstance(target, nn.Module) else target.engine.module
    if module is not None:
        gathering.reshard(module)
    if isinstance(target, nn.Module):
        return list(target.parameters())
    return [tensor for group in target.param_groups for tensor in group["params"]]
