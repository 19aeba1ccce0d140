"""Checkpoints: all that a run is, or only how far its trajectory has come, from which that can be had again.

Weights and optimizer tensors are safetensors, all else is JSON. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoext import TrajectoryError, ZerothOrderOptimizer, replay
from zoext._runtime import atomic
from zoext.cli import plain
from zoext.cli.errors import UserError, writing
from zoext.cli.position import Position
from zoext.cli.weights import put, tensors_of
from zoext.trajectory import NOISE_FIELD, VersionError, last_whole_step

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
NAME = r"step-\d{8,}"
KEPT = 2  # the newest, and one to fall back on should that be damaged later


class Reached(NamedTuple):
    """How far a run has come: its steps, their forward passes, and its trajectory, which is on the disk.

    A run that goes on without a trajectory has None.
    """

    step: int
    forwards: int
    trajectory: Position | None

    def check(self, trajectory: Path) -> None:
        """Raises a TrajectoryError unless the file begins with what it was when this was written."""
        if self.trajectory is None:
            raise TrajectoryError(f"{trajectory}: was not recorded any more when the checkpoint was written")
        self.trajectory.check(trajectory)


@dataclass(frozen=True)
class Saved:
    """What a run had in memory."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read whole and found intact; nothing has been changed yet.

    ``threads`` is how many torch had in the process that wrote it.
    """

    path: Path
    reached: Reached
    saved: Saved | None
    threads: int

    def restore(self, model: nn.Module, optimizer: ZerothOrderOptimizer, trajectory: Path) -> None:
        """Puts model and optimizer, which are as the run began, where they were when this was written.

        Raises:
            UserError: for another model, or, without weights, a ``trajectory`` that is damaged or another.
        """
        if self.saved is not None:
            _check_fits(self.path, self.saved.weights, model)
            optimizer.load_state_dict(self.saved.optimizer)
            put(model, self.saved.weights)
            return
        try:
            self.reached.check(trajectory)
            replay(optimizer, trajectory, to_step=self.reached.step)
        except VersionError as error:
            raise UserError(str(error)) from None
        except ValueError as error:
            raise UserError(f"{error}; {self._remedy(trajectory)}") from None

    def _remedy(self, trajectory: Path) -> str:
        """What can still be done with a ``trajectory`` that does not lead here."""
        if self._is_intact(trajectory):
            return "resume with the model, the data and the versions that the run began with"
        last = last_whole_step(trajectory)
        rest = f"zoext replay BASE {trajectory} --to-step {last} --out DIR still makes that model; "
        older = [path for path in existing(self.path.parent) if path < self.path]
        if older and _leads_to(older[-1], trajectory):
            remedy = f"remove {self.path} to resume from {older[-1].name}"
        else:
            remedy = "put back the one of this run, or start again with --overwrite"
        return ("" if last is None else rest) + remedy

    def _is_intact(self, trajectory: Path) -> bool:
        try:
            self.reached.check(trajectory)
        except TrajectoryError:
            return False
        return (last_whole_step(trajectory) or 0) >= self.reached.step


def _leads_to(path: Path, trajectory: Path) -> bool:
    """Whether a run can be resumed from the checkpoint ``path``."""
    try:
        found = _read(path)
    except _DamagedError:
        return False
    return found.saved is not None or found._is_intact(trajectory)


def _check_fits(path: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Raises a UserError unless names, shapes and dtypes are those of ``model``."""
    theirs, ours = _outline(weights), _outline(tensors_of(model))
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"{path}: comes from another model: {name} is {theirs.get(name, 'absent')} there and "
            f"{ours.get(name, 'absent')} here; resume with the model of that run, or give another --out"
        )


def _outline(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def save(folder: Path, reached: Reached, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes a checkpoint that holds the weights, there whole or not at all; drops older ones."""
    from safetensors.torch import save_file

    if (path := _path(folder, reached)).exists():  # the one that this run resumed from, and nothing moved
        return
    state_tensors: dict[str, Tensor] = {}
    state = plain.pack(optimizer.state_dict(), state_tensors)
    with _saving(path), atomic.new_folder(path) as temporary:
        # safetensors refuses tensors that share memory, such as buffers that are views of one table.
        weights = {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(model).items()}
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / WEIGHTS)
        save_file(state_tensors, temporary / OPTIMIZER)
        digests = {name: _digest(temporary / name) for name in (WEIGHTS, OPTIMIZER)}
        _write_state(temporary, reached, {"sha256": digests, "optimizer": state})
    _drop_old(folder)


def save_position(folder: Path, reached: Reached) -> None:
    """Writes a checkpoint from which the trajectory is replayed, as ``save``."""
    if (path := _path(folder, reached)).exists():
        return
    with _saving(path), atomic.new_folder(path) as temporary:
        _write_state(temporary, reached, {})
    _drop_old(folder)


def _saving(path: Path) -> AbstractContextManager[None]:
    return writing(path, f"zoext finetune --out {path.parents[1]} --resume")


def _path(folder: Path, reached: Reached) -> Path:
    return folder / f"step-{reached.step:08d}"


def _write_state(folder: Path, reached: Reached, more: dict[str, Any]) -> None:
    position = None if reached.trajectory is None else reached.trajectory._asdict()
    record = {
        **reached._asdict(),
        "trajectory": position,
        "threads": torch.get_num_threads(),
        "noise_field": NOISE_FIELD,
        **more,
    }
    text = json.dumps({"checksum": _checksum(record), **record}, indent=1)
    (folder / STATE).write_text(text, encoding="utf-8")


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _drop_old(folder: Path) -> None:
    for old in existing(folder)[:-KEPT]:
        shutil.rmtree(old)


def existing(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(NAME, path.name))


def load_newest(folder: Path) -> Checkpoint | None:
    """Reads and checks the newest checkpoint below ``folder``; None if there is none yet.

    Raises:
        UserError: if it is damaged, with the file and the remedy; if directions are others now.
    """
    found = existing(folder)
    if not found:
        return None
    newest = found[-1]
    remedy = (
        f"remove {newest} to resume from {found[-2].name}"
        if len(found) > 1
        else f"remove {newest} to begin anew and keep the trajectory for zoext replay, or start again "
        "with --overwrite"
    )
    try:
        return _read(newest)
    except _DamagedError as damage:
        raise UserError(f"{damage}; {remedy}") from None


class _DamagedError(Exception):
    pass


def _read(path: Path) -> Checkpoint:
    try:
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        if record.pop("checksum") != _checksum(record):
            raise _DamagedError(f"{path / STATE}: damaged, its checksum is that of another content")
        _check_noise_field(path, record["noise_field"])
        position = record["trajectory"]
        if position is not None:
            position = Position.of_record(position)
        reached = Reached(int(record["step"]), int(record["forwards"]), position)
        digests = dict(record["sha256"]) if "sha256" in record else None
        saved = None if digests is None else _read_saved(path, record, digests)
        return Checkpoint(path, reached, saved, int(record["threads"]))
    except OSError as error:
        raise _DamagedError(f"{path / STATE}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _DamagedError(f"{path / STATE}: damaged, it is not what a run writes") from None


def _check_noise_field(path: Path, found: object) -> None:
    """A run that goes on with other directions would be another run."""
    if found != NOISE_FIELD:
        raise UserError(
            f"{path / STATE}: noise_field is {found}, that of this zoext is {NOISE_FIELD}; resume with the "
            "zoext that the run began with"
        )


def _read_saved(path: Path, record: dict[str, Any], digests: dict[str, str]) -> Saved:
    weights, state_tensors = (_read_tensors(path / name, digests[name]) for name in (WEIGHTS, OPTIMIZER))
    return Saved(weights, plain.unpack(record["optimizer"], state_tensors))


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if _digest(path) == digest:
            return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _DamagedError(f"{path}: cannot be read ({error})") from None
    raise _DamagedError(f"{path}: damaged, its checksum differs from that in {STATE}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
