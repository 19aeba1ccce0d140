"""A checkpoint is there whole or not at all, is found out when damaged, and holds no pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import zoext
from zoext import atomic
from zoext.cli import checkpoint
from zoext.cli.errors import UserError


class PlainState(torch.optim.Optimizer):
    """An optimizer with every kind of state that there may be, tensors of several dtypes among them."""

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
    checkpoint.save(tmp_path, 1, 2, model, optimizer)
    other, other_optimizer = make(seed=2)
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    assert (saved.step, saved.forwards) == (1, 2)
    saved.restore(other, other_optimizer)
    assert other_optimizer.state_dict() == optimizer.state_dict()
    for name, tensor in model.state_dict().items():
        assert other.state_dict()[name].equal(tensor), name


def test_plain_optimizer_state_comes_back_with_its_types(tmp_path: Path) -> None:
    model, _ = make()
    optimizer = PlainState(model)
    checkpoint.save(tmp_path, 3, 6, model, optimizer)
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    want = optimizer.state_dict()
    assert saved.optimizer["param_groups"] == want["param_groups"]
    assert saved.optimizer["state"].keys() == want["state"].keys()
    for key, state in want["state"].items():
        torch.testing.assert_close(saved.optimizer["state"][key], state, rtol=0, atol=0)


def test_state_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    model, optimizer = make()
    optimizer.state[next(model.parameters())] = {"generator": torch.Generator()}
    with pytest.raises(TypeError, match="Generator"):
        checkpoint.save(tmp_path, 1, 2, model, optimizer)
    assert checkpoint.existing(tmp_path) == []


def test_files_are_safetensors_and_json(tmp_path: Path) -> None:
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, 2, model, optimizer)
    files = outline(checkpoint.existing(tmp_path)[0])
    assert sorted(files) == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    json.loads(files["state.json"])
    weights = safetensors.torch.load(files["weights.safetensors"])
    assert weights["0.weight"].equal(model[0].weight)


@pytest.mark.parametrize("function", ["save_file", "replace", "fsync"])
def test_a_failure_while_writing_leaves_the_checkpoints_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, 2, model, optimizer)
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
            checkpoint.save(tmp_path, 2, 4, model, optimizer)
    assert outline(tmp_path) == before


def test_half_a_checkpoint_of_a_killed_process_is_no_checkpoint(tmp_path: Path) -> None:
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, 2, model, optimizer)
    half = tmp_path / ".step-00000002.4711.tmp"
    shutil.copytree(checkpoint.existing(tmp_path)[0], half)
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    hidden = tmp_path / ".keep"
    hidden.write_text("the user's own")
    atomic.remove_leftovers(tmp_path / "step-*")
    assert not half.exists()
    assert hidden.exists()


def test_only_the_two_newest_are_kept(tmp_path: Path) -> None:
    model, optimizer = make()
    for step in (9, 10, 100, 101):
        checkpoint.save(tmp_path, step, 2 * step, model, optimizer)
    assert [path.name for path in checkpoint.existing(tmp_path)] == ["step-00000100", "step-00000101"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_found_before_anything_changes(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = make()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, 2 * step, model, optimizer)
    file = checkpoint.existing(tmp_path)[-1] / name
    content = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(content[:-3])
        case "flipped":
            # In JSON a brace, elsewhere a bit of the last number.
            file.write_bytes(content.replace(b"{", b"[", 1) if name == "state.json" else flip_last(content))
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: .*; remove .*step-00000002 to resume from step-00000001"):
        checkpoint.load_newest(tmp_path)
    shutil.rmtree(file.parent)
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    assert saved.step == 1


def flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, 2, model, optimizer)
    other, other_optimizer = make(width=6)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    with pytest.raises(
        UserError, match=r"another model: 0\.bias is torch\.float32 \[5\] there and .* \[6\] here"
    ):
        saved.restore(other, other_optimizer)
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
