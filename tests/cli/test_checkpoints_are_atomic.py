"""Checkpoints are written atomically, corruption is detected, and nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import zoext
from zoext._runtime import atomic
from zoext.cli._errors import UserError
from zoext.cli._restoring import newest_checkpoint, restore
from zoext.cli._runs import checkpoint
from zoext.cli._runs.checkpoint import Position, Reached

TRAJECTORY = Path(os.devnull)
ENDED = 9999999  # the number of no process: Linux has at most 2^22


def reached(step: int) -> Reached:
    return Reached(step, 2 * step, Position.of(TRAJECTORY))


def test_a_long_trajectory_is_not_read_into_memory(tmp_path: Path) -> None:
    path, data = tmp_path / "long.jsonl", bytes(range(256)) * 2**15
    path.write_bytes(data)
    tracemalloc.start()
    position = Position.of(path)
    path.write_bytes(data + b"and more")
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    position.check(path)
    assert Position.of(path).bytes == len(data) + 8
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert position == (len(data), hashlib.sha256(data).hexdigest())
    assert peak < len(data) // 2
    for changed in (data[:-1], data[:-1] + b"x" + b"and more", b""):
        path.write_bytes(changed)
        with pytest.raises(zoext.TrajectoryError, match="is not what it was"):
            position.check(path)


class PlainState(torch.optim.Optimizer):
    """An optimizer with every kind of state, including tensors of several dtypes."""

    def __init__(self, model: nn.Module) -> None:
        group = {"params": list(model.parameters()), "lr": 0.1, "betas": (0.7, 0.9), "recipe": {"rank": 2}}
        super().__init__([group], {})
        for i, parameter in enumerate(model.parameters()):
            self.state[parameter] = {
                "step": i,
                "seeds": torch.tensor([-(2**63), 2**63 - 1]),
                "ring": [torch.randn(3), torch.tensor(1e-42)],
                "nothing": None,
                "half": torch.tensor([0.1], dtype=torch.bfloat16),
            }


def make(seed: int = 1, width: int = 5) -> tuple[nn.Module, zoext.MeZO]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, zoext.MeZO(model, lr=0.03, mu=0.007, weight_decay=0.2, seed=2**64 - 3)


def outline(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = make()
    optimizer.step(lambda: model(torch.ones(4, 3)).square().mean())
    checkpoint.save(tmp_path, reached(1), model, optimizer)
    other, other_optimizer = make(seed=2)
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert saved.reached == reached(1)
    restore(saved, other, other_optimizer, TRAJECTORY)
    assert other_optimizer.state_dict() == optimizer.state_dict()
    for name, tensor in model.state_dict().items():
        assert other.state_dict()[name].equal(tensor), name


def test_plain_optimizer_state_comes_back_with_its_types(tmp_path: Path) -> None:
    model, _ = make()
    optimizer = PlainState(model)
    checkpoint.save(tmp_path, reached(3), model, optimizer)
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert saved.saved is not None
    found = saved.saved.optimizer
    want = optimizer.state_dict()
    assert found["param_groups"] == want["param_groups"]
    assert found["state"].keys() == want["state"].keys()
    for key, state in want["state"].items():
        torch.testing.assert_close(found["state"][key], state, rtol=0, atol=0)


def test_state_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    model, optimizer = make()
    optimizer.state[next(model.parameters())] = {"generator": torch.Generator()}
    with pytest.raises(TypeError, match="Generator"):
        checkpoint.save(tmp_path, reached(1), model, optimizer)
    assert checkpoint.existing(tmp_path) == []


def test_files_are_safetensors_and_json(tmp_path: Path) -> None:
    model, optimizer = make()
    checkpoint.save(tmp_path, reached(1), model, optimizer)
    files = outline(checkpoint.existing(tmp_path)[0])
    assert sorted(files) == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    json.loads(files["state.json"])
    weights = safetensors.torch.load(files["weights.safetensors"])
    assert weights["0.weight"].equal(model[0].weight)


def test_a_checkpoint_without_weights_is_small(tmp_path: Path) -> None:
    checkpoint.save_position(tmp_path, reached(3))
    files = outline(checkpoint.existing(tmp_path)[0])
    assert list(files) == ["state.json"]
    assert len(files["state.json"]) < 400
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert saved.reached == reached(3)
    assert saved.saved is None


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    model, optimizer = make()
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "run", reached(1), model, optimizer)
    finally:
        os.umask(before)
    path = checkpoint.existing(tmp_path / "run")[0]
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


@pytest.mark.parametrize("function", ["save_file", "replace", "fsync"])
def test_a_failure_while_writing_leaves_the_checkpoints_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    model, optimizer = make()
    checkpoint.save(tmp_path, reached(1), model, optimizer)
    before = outline(tmp_path)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    where = {
        "save_file": "safetensors.torch.save_file",
        "replace": "pathlib.Path.replace",
        "fsync": "os.fsync",
    }
    with monkeypatch.context() as patch:
        patch.setattr(where[function], full)
        with pytest.raises(UserError, match="No space"):
            checkpoint.save(tmp_path, reached(2), model, optimizer)
    assert outline(tmp_path) == before


def test_half_a_checkpoint_of_a_killed_process_is_no_checkpoint(tmp_path: Path) -> None:
    model, optimizer = make()
    checkpoint.save(tmp_path, reached(1), model, optimizer)
    half = tmp_path / f".step-00000002.{ENDED}.tmp"
    shutil.copytree(checkpoint.existing(tmp_path)[0], half)
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert saved.reached.step == 1
    hidden = tmp_path / ".keep"
    hidden.write_text("the user's own")
    atomic.remove_leftovers_of(tmp_path, checkpoint.NAME)
    assert not half.exists()
    assert hidden.exists()


def test_only_the_two_newest_are_kept(tmp_path: Path) -> None:
    model, optimizer = make()
    for step in (9, 10, 100, 101):
        checkpoint.save(tmp_path, reached(step), model, optimizer)
    assert [path.name for path in checkpoint.existing(tmp_path)] == ["step-00000100", "step-00000101"]


@pytest.mark.parametrize("fault", ["cut", "flipped", "gone", "empty"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_corruption_is_detected_before_anything_changes(tmp_path: Path, name: str, fault: str) -> None:
    model, optimizer = make()
    for step in (1, 2):
        checkpoint.save(tmp_path, reached(step), model, optimizer)
    file = checkpoint.existing(tmp_path)[-1] / name
    content = file.read_bytes()
    match fault:
        case "cut":
            file.write_bytes(content[:-3])
        case "flipped":
            # In JSON a brace, otherwise a bit of the last number.
            file.write_bytes(content.replace(b"{", b"[", 1) if name == "state.json" else flip_last(content))
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: .*; remove .*step-00000002 to resume from step-00000001"):
        newest_checkpoint(tmp_path)
    shutil.rmtree(file.parent)
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert saved.reached.step == 1


def flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = make()
    checkpoint.save(tmp_path, reached(1), model, optimizer)
    other, other_optimizer = make(width=6)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    with pytest.raises(
        UserError, match=r"model mismatch: 0\.bias is torch\.float32 \[5\] there and .* \[6\] here"
    ):
        restore(saved, other, other_optimizer, TRAJECTORY)
    assert all(other.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert other_optimizer.param_groups[0]["step"] == 0


def test_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    atomic.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            atomic.write_text(path, "new")
    assert outline(tmp_path) == {"run.json": b"old"}
    atomic.write_text(path, "new")
    assert outline(tmp_path) == {"run.json": b"new"}


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", "old")
    with atomic.new_folder(path, replace=True) as temporary:
        (temporary / "file").write_text("new")
        assert outline(path) == {"file": b"old"}
    assert outline(tmp_path) == {"model/file": b"new"}
    with pytest.raises(FileExistsError), atomic.new_folder(path):
        pass


@pytest.mark.parametrize("at", [1, 2])
def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    path, calls, replace = folder(tmp_path / "model", "old"), 0, Path.replace

    def refused(source: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(5, "Input/output error")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="Input"), atomic.new_folder(path, replace=True) as temporary:
        (temporary / "file").write_text("new")
    assert outline(tmp_path) == {"model/file": b"old"}


def test_what_a_killed_process_leaves_of_a_replacement(tmp_path: Path) -> None:
    """Killed between the two renames, or after them."""
    path = tmp_path / "model"
    folder(tmp_path / ".model.old.tmp", "old")
    folder(tmp_path / f".model.{ENDED}.tmp", "new")
    atomic.remove_leftovers(path)
    assert outline(tmp_path) == {"model/file": b"old"}
    folder(tmp_path / ".model.old.tmp", "older")
    with atomic.new_folder(path, replace=True) as temporary:
        (temporary / "file").write_text("new")
    assert outline(tmp_path) == {"model/file": b"new"}
    folder(tmp_path / ".model.old.tmp", "older")
    atomic.remove_leftovers(path)
    assert outline(tmp_path) == {"model/file": b"new"}


@pytest.mark.parametrize("name", ["model", "[ab]", "*", "a.b", "step-00000002"])
def test_folders_that_are_no_leftovers_stay(tmp_path: Path, name: str) -> None:
    """Files of the user, of other programs and names, and of running processes."""
    mine = [".a.mine.tmp", ".model.backup.tmp", ".aXb.7.tmp", ".step-1.7.tmp", f".x.{name}.{ENDED}.tmp"]
    alive = {f".{name}.{number}.tmp" for number in (os.getppid(), 1)}  # one, if the parent has ended
    for other in [*mine, *alive, f".{name}.{10 * ENDED}.tmp"]:
        folder(tmp_path / other, "precious")
    (tmp_path / f".{name}.9999998.tmp").symlink_to(folder(tmp_path / "elsewhere", "precious"))
    before = outline(tmp_path)
    for number in (ENDED, os.getpid()):
        folder(tmp_path / f".{name}.{number}.tmp", "half")
    atomic.remove_leftovers(tmp_path / name)
    atomic.remove_leftovers(tmp_path / "absent" / name)
    assert outline(tmp_path) == before
    assert (tmp_path / f".{name}.9999998.tmp").is_symlink()
