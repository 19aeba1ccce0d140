"""Whatever gets a name gets it on the disk, before anything that depends on it is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import zoext
from support.faulty_runs import FaultyRun
from zoext._runtime import atomic
from zoext.cli._runs import checkpoint, records
from zoext.cli._runs.checkpoint import Reached
from zoext.cli._runs.claim import claimed


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> dict[Path, set[str]]:
    """For each folder, the names in it when it was last synced."""
    names: dict[Path, set[str]] = {}
    sync = atomic.sync

    def syncs(path: Path) -> None:
        sync(path)
        if path.is_dir():
            names[path.resolve()] = set(os.listdir(path))

    monkeypatch.setattr(atomic, "sync", syncs)
    return names


def assert_durable(path: Path, synced: dict[Path, set[str]], root: Path) -> None:
    """The names of ``path`` and of all folders above it, up to ``root``."""
    for name in (path, *path.parents):
        if name == root:
            return
        assert name.name in synced.get(name.parent, ()), name


def test_a_checkpoint_in_new_folders(tmp_path: Path, synced: dict[Path, set[str]]) -> None:
    folder = tmp_path / "a" / "b" / "checkpoints"
    checkpoint.save_position(folder, Reached(3, 6, None))
    assert_durable(checkpoint.existing(folder)[0], synced, tmp_path)


def test_the_first_metrics(tmp_path: Path, synced: dict[Path, set[str]]) -> None:
    path = tmp_path / "metrics.jsonl"
    records.append(path, [{"step": 1}])
    assert_durable(path, synced, tmp_path)
    synced.clear()
    records.append(path, [{"step": 2}])
    assert synced == {}, "a folder is synced for no new name"


@pytest.mark.parametrize("out", ["a/b", None])
def test_the_folder_of_a_run(
    tmp_path: Path, synced: dict[Path, set[str]], monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    with claimed(None if out is None else Path(out), "finetune") as path:
        assert_durable(path.resolve(), synced, tmp_path)


@pytest.mark.parametrize("resume", [False, True])
def test_frames(tmp_path: Path, synced: dict[Path, set[str]], resume: bool) -> None:
    run, path = FaultyRun("agzo"), tmp_path / "run.jsonl"
    if resume:  # of a run that was killed before it made them
        zoext.Trajectory(path, run.optimizer, frames=True).close()
        (tmp_path / "run.frames").unlink()
        synced.clear()
    with zoext.Trajectory(path, run.optimizer, frames=True, resume=resume):
        assert_durable(tmp_path / "run.frames", synced, tmp_path)
