"""Checkpoints: weights and optimizer tensors as safetensors, all else as JSON. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoext import atomic
from zoext.cli import plain
from zoext.cli.errors import UserError, writing
from zoext.cli.weights import put, tensors_of

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
KEPT = 2  # the newest, and one to fall back on should that be damaged later


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read whole and found intact; nothing has been changed yet."""

    path: Path
    step: int
    forwards: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]

    def check_fits(self, model: nn.Module) -> None:
        """Raises a UserError unless names, shapes and dtypes are those of ``model``."""
        theirs, ours = _outline(self.weights), _outline(tensors_of(model))
        different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        if different:
            name = different[0]
            raise UserError(
                f"{self.path}: comes from another model: {name} is {theirs.get(name, 'absent')} there and "
                f"{ours.get(name, 'absent')} here; resume with the model of that run, or give another --out"
            )

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts model and optimizer where they were when the checkpoint was written."""
        self.check_fits(model)
        optimizer.load_state_dict(self.optimizer)
        put(model, self.weights)


def _outline(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def save(folder: Path, step: int, forwards: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the checkpoint of ``step`` below ``folder``, there whole or not at all; drops older ones."""
    from safetensors.torch import save_file

    path = folder / f"step-{step:08d}"
    if path.exists():  # the one that this run resumed from, and nothing has moved since
        return
    state_tensors: dict[str, Tensor] = {}
    state = plain.pack(optimizer.state_dict(), state_tensors)
    with writing(path), atomic.new_folder(path) as temporary:
        # safetensors refuses tensors that share memory, such as buffers that are views of one table.
        weights = {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(model).items()}
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / WEIGHTS)
        save_file(state_tensors, temporary / OPTIMIZER)
        digests = {name: _digest(temporary / name) for name in (WEIGHTS, OPTIMIZER)}
        record = {"step": step, "forwards": forwards, "sha256": digests, "optimizer": state}
        (temporary / STATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for old in existing(folder)[:-KEPT]:
        shutil.rmtree(old)


def existing(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def load_newest(folder: Path) -> Checkpoint | None:
    """Reads and checks the newest checkpoint below ``folder``; None if there is none yet.

    Raises:
        UserError: if it is damaged, with the file and the remedy.
    """
    found = existing(folder)
    if not found:
        return None
    newest = found[-1]
    remedy = (
        f"remove {newest} to resume from {found[-2].name}"
        if len(found) > 1
        else "start again with --overwrite"
    )
    try:
        return _read(newest)
    except _DamagedError as damage:
        raise UserError(f"{damage}; {remedy}") from None


class _DamagedError(Exception):
    pass


def _read(path: Path) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        step, forwards = int(record["step"]), int(record["forwards"])
        digests, state = dict(record["sha256"]), record["optimizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{path / STATE}: damaged or missing ({error!r})") from None
    tensors = {}
    for name in (WEIGHTS, OPTIMIZER):
        try:
            intact = _digest(path / name) == digests.get(name)
            tensors[name] = load_file(path / name) if intact else {}
        except (OSError, SafetensorError) as error:
            raise _DamagedError(f"{path / name}: cannot be read ({error})") from None
        if not intact:
            raise _DamagedError(f"{path / name}: damaged, its checksum differs from that in {STATE}")
    try:
        optimizer = plain.unpack(state, tensors[OPTIMIZER])
    except (KeyError, ValueError, TypeError) as error:
        raise _DamagedError(f"{path / STATE}: damaged ({error!r})") from None
    return Checkpoint(path, step, forwards, tensors[WEIGHTS], optimizer)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
