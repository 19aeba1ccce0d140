"""What a resumed trajectory cuts is kept, and it never goes on with weights that could not be replayed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

import zoext
from support.faulty_runs import FaultyRun
from support.trajectory_files import record
from zoext._runtime import atomic
from zoext.trajectory import TrajectoryError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def at_step(recipe: str, steps: int) -> FaultyRun:
    run = FaultyRun(recipe)
    run.healthy(steps)
    return run


@pytest.mark.parametrize("recipe", ["mezo", "agzo"])
@pytest.mark.parametrize("resumed_at", [0, 3])
def test_what_is_cut_is_kept(recipe: str, resumed_at: int, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, 5, recipe)
    names, whole = {file.name for file in tmp_path.iterdir()}, contents(tmp_path)
    for name in names:
        (tmp_path / f"{name}.cut").write_text("older")
    run = at_step(recipe, resumed_at)
    zoext.Trajectory(path, run.optimizer, resume=True).close()
    assert {file.name for file in tmp_path.iterdir()} == names | {f"{name}.cut" for name in names}
    for name in names:
        kept, cut = (tmp_path / name).read_bytes(), (tmp_path / f"{name}.cut").read_bytes()
        assert kept + cut == whole[name]
        assert cut


@pytest.mark.parametrize("torn", [b"", b'{"step":6,'])
def test_nothing_is_kept_where_no_step_is_cut(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    _, run = record(path, 5)
    whole = contents(tmp_path)
    with path.open("ab") as file:
        file.write(torn)
    zoext.Trajectory(path, run.optimizer, resume=True).close()
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("moment", ["copied", "one shortened"])
def test_killed_while_it_is_cut(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    record(path, 5, "agzo")
    whole, real, calls = contents(tmp_path), os.truncate, []

    def truncate(file: Path, size: int) -> None:
        calls.append(file)
        if len(calls) == (1 if moment == "copied" else 2):
            raise KeyboardInterrupt
        real(file, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", truncate)
        with pytest.raises(KeyboardInterrupt):
            zoext.Trajectory(path, at_step("agzo", 2).optimizer, resume=True)
    zoext.Trajectory(path, at_step("agzo", 2).optimizer, resume=True).close()
    for name, data in whole.items():
        assert (tmp_path / name).read_bytes() + (tmp_path / f"{name}.cut").read_bytes() == data


def test_a_disk_without_room_for_what_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    record(path, 5)
    whole = contents(tmp_path)

    def copyfileobj(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.shutil, "copyfileobj", copyfileobj)
    with pytest.raises(OSError, match="No space"):
        zoext.Trajectory(path, at_step("mezo", 2).optimizer, resume=True)
    assert contents(tmp_path) == whole


def test_other_weights_are_refused_where_recording_began(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, 3)
    whole, run = contents(tmp_path), FaultyRun("mezo")
    with torch.no_grad():
        run.model[3].weight[0, 0] += 1
    with pytest.raises(TrajectoryError, match=r"3\.weight has other weights than the run had at step 0"):
        zoext.Trajectory(path, run.optimizer, resume=True)
    assert contents(tmp_path) == whole
    assert run.optimizer.recorder is None
    with zoext.Trajectory(path, FaultyRun("mezo").optimizer, resume=True):
        pass
