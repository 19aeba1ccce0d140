"""The folder of ``zoext replay``: a model or a difference, and a note of its origin."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoext._parameters import shards
from zoext._runtime import atomic
from zoext.cli._errors import UserError, writing
from zoext.cli._problem import models
from zoext.cli._ranks import Ranks

_NOTE, _DIFFERENCE = "replay.json", "difference.safetensors"


class Difference(NamedTuple):
    """Tuned minus base weights of the parameters that changed, in float32.

    ``rounded`` of the ``elements`` are not exact.
    """

    tensors: dict[str, Tensor]
    elements: int
    rounded: int


@torch.no_grad()
def copies(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Copies of the parameters with these names, as far as they exist."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if name in names}


@torch.no_grad()
def difference_of(model: nn.Module, before: Mapping[str, Tensor], ranks: Ranks) -> Difference:
    """The difference between ``model`` and the copies ``before``, on the first rank; none on the others."""
    tensors, elements, rounded = {}, 0, 0
    for name, parameter in model.named_parameters():
        if name not in before:
            continue
        tuned, base = shards.whole(parameter), shards.whole(before[name])  # one at a time
        if ranks.is_first and not tuned.equal(base):
            tensors[name], inexact = _subtract(tuned.cpu().double(), base.cpu().double())
            elements += tuned.numel()
            rounded += inexact
    return Difference(tensors, elements, rounded)


def _subtract(tuned: Tensor, base: Tensor) -> tuple[Tensor, int]:
    """``tuned - base``, both float64, as float32, and the number of inexact elements."""
    found = tuned - base
    # The rounding error of that subtraction: Knuth, The Art of Computer Programming, volume 2, 4.2.2.
    other = tuned - found
    error = (tuned - (found + other)) + (other - base)
    fp32 = found.float()
    return fp32, int(((error != 0) | (fp32 != found)).sum())


class ReplayFolder:
    """``--out``, which is written atomically; an earlier replay is replaced atomically too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._real = path.resolve()

    def check_free(self, overwrite: bool) -> None:
        """Raises a UserError if writing would replace anything but, on ``overwrite``, a replay."""
        folder = atomic.where(self._real)
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(f"--out {self.path}: is a file; give a folder")
        there = {str(file.relative_to(folder)) for file in folder.rglob("*")}
        foreign = sorted(there - _files_of_replay(folder))
        if foreign:
            raise UserError(
                f"--out {self.path}: contains {foreign[0]}, which no replay wrote; give another folder"
            )
        if there and not overwrite:
            raise UserError(f"--out {self.path}: contains a replay; give --overwrite or another folder")

    def check_spares(self, inputs: Sequence[Path]) -> None:
        """Raises a UserError if writing would replace one of the inputs."""
        for given in inputs:
            if not (given.exists() and self.path.exists()):  # a name on the hub, or a new folder
                continue
            real = given.resolve()
            if any(self.path.samefile(path) for path in (real, *real.parents)):
                raise UserError(f"--out {self.path}: the replay would replace {given}; give another folder")

    def write_model(self, model: Any, tokenizer: Any | None, record: dict[str, Any], overwrite: bool) -> None:
        """Writes a model, and its tokenizer if it has one, for from_pretrained of transformers."""
        with self._new(record, overwrite) as folder, models.quiet_transformers():
            models.save(model, tokenizer, folder)

    def write_difference(self, difference: Difference, record: dict[str, Any], overwrite: bool) -> None:
        """Writes the tensors as safetensors, and the counts into the note."""
        from safetensors.torch import save_file

        counts = {"elements": difference.elements, "rounded": difference.rounded}
        with self._new({**record, "difference": counts}, overwrite) as folder:
            save_file(difference.tensors, folder / _DIFFERENCE, metadata={"format": "pt"})

    @contextmanager
    def _new(self, record: dict[str, Any], overwrite: bool) -> Iterator[Path]:
        with writing(self.path):
            atomic.remove_leftovers(self._real)
            check = partial(self.check_free, overwrite)  # again, because loading and replaying take time
            with atomic.new_folder(self._real, replace=True, check=check) as temporary:
                yield temporary
                files = sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*"))
                packages = {name: version(name) for name in ("zoext", "torch", "transformers")}
                note = {**record, "packages": packages, "files": files}
                (temporary / _NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def _files_of_replay(folder: Path) -> set[str]:
    try:
        files = json.loads((folder / _NOTE).read_text(encoding="utf-8"))["files"]
        return {_NOTE, *map(str, files)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
