"""Opens the files of a trajectory on the rank that writes it, or raises on all ranks of the run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory._agreement import Agreement
from zoext.trajectory._format import frames as side_file
from zoext.trajectory._format.header import Header, gather
from zoext.trajectory._writer import continuing
from zoext.trajectory._writer.background import BackgroundWriter
from zoext.trajectory._writer.continuing import End
from zoext.trajectory._writer.owned_file import OwnedFile

Opened = tuple[BackgroundWriter, End]


def begin(
    path: Path,
    optimizer: ZerothOrderOptimizer,
    agreement: Agreement,
    *,
    is_first: bool,
    frames: bool,
    notes: Mapping[str, Any],
) -> Opened | None:
    """Creates a trajectory without steps on the first rank; returns None on the others."""
    with ExitStack() as opened, agreement.reached():
        if not is_first:
            gather(optimizer)
            return None
        end = continuing.begin(path, Header.of(optimizer, frames, notes))
        file = opened.enter_context(OwnedFile(path))
        return _writer(path, file, end, opened)


def resume(
    path: Path, optimizer: ZerothOrderOptimizer, agreement: Agreement, *, is_first: bool, frames: bool
) -> Opened | None:
    """Cuts a trajectory to the current step on the first rank; returns None on the others."""
    found = None
    with ExitStack() as opened:
        with agreement.reached():
            if is_first:
                file = opened.enter_context(OwnedFile(path))
                found = continuing.find(path, optimizer, frames)
        has_digests = agreement.any(found is not None and found.at_beginning)
        with agreement.reached():
            if found is None:
                if has_digests:
                    gather(optimizer)
                return None
            if has_digests:
                continuing.check_weights(found, optimizer)
            continuing.cut(found)
            return _writer(path, file, found.end, opened)


def _writer(path: Path, file: OwnedFile, end: End, opened: ExitStack) -> Opened:
    """The writer, which closes the files that ``opened`` would close."""
    files = [file]
    if end.frames is not None:
        files.insert(0, opened.enter_context(OwnedFile(side_file.path_beside(path))))
    writer = BackgroundWriter(*files)
    opened.pop_all()
    return writer, end
