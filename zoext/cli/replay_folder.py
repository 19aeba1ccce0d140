"""The folder of ``zoext replay``: a model or a difference, and a note of where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zoext._runtime import atomic
from zoext.cli.difference import Difference
from zoext.cli.errors import UserError, writing
from zoext.cli.models import quiet_transformers

NOTE, DIFFERENCE = "replay.json", "difference.safetensors"


class ReplayFolder:
    """``--out``, which appears as a whole. A replay that is there is replaced only as a whole as well."""

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
                f"--out {self.path}: holds {foreign[0]}, which no replay wrote; give another folder"
            )
        if there and not overwrite:
            raise UserError(f"--out {self.path}: holds a replay; give --overwrite or another folder")

    def check_spares(self, inputs: Sequence[Path]) -> None:
        """Raises a UserError if the folder would replace what is read."""
        for given in inputs:
            if not (given.exists() and self.path.exists()):  # a name on the hub, or a new folder
                continue
            real = given.resolve()
            if any(self.path.samefile(path) for path in (real, *real.parents)):
                raise UserError(f"--out {self.path}: the replay would replace {given}; give another folder")

    def write_model(self, model: Any, tokenizer: Any | None, record: dict[str, Any], overwrite: bool) -> None:
        """Writes a model, and its tokenizer if it has one, for from_pretrained of transformers."""
        with self._new(record, overwrite) as folder, quiet_transformers():
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

    def write_difference(self, difference: Difference, record: dict[str, Any], overwrite: bool) -> None:
        """Writes the tensors as safetensors, and the counts into the note."""
        from safetensors.torch import save_file

        counts = {"elements": difference.elements, "rounded": difference.rounded}
        with self._new({**record, "difference": counts}, overwrite) as folder:
            save_file(difference.tensors, folder / DIFFERENCE, metadata={"format": "pt"})

    @contextmanager
    def _new(self, record: dict[str, Any], overwrite: bool) -> Iterator[Path]:
        with writing(self.path):
            atomic.remove_leftovers(self._real)
            check = partial(self.check_free, overwrite)  # again: loading and replaying may take long
            with atomic.new_folder(self._real, replace=True, check=check) as temporary:
                yield temporary
                files = sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*"))
                packages = {name: version(name) for name in ("zoext", "torch", "transformers")}
                note = {**record, "packages": packages, "files": files}
                (temporary / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def _files_of_replay(folder: Path) -> set[str]:
    try:
        files = json.loads((folder / NOTE).read_text(encoding="utf-8"))["files"]
        return {NOTE, *map(str, files)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
