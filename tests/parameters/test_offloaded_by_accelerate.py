"""Accelerate offloads a frozen base to the CPU or the disk; steps are those of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

accelerate = pytest.importorskip("accelerate")
from accelerate import hooks  # noqa: E402

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


class LoRA(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def base_of() -> nn.Module:
    torch.manual_seed(0)
    return Base().requires_grad_(False).eval()


def with_adapters(base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    base.first, base.last = LoRA(base.first), LoRA(base.last)
    return base


def to_cpu(base: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(base, execution_device="cpu", offload_buffers=True)


def to_disk(base: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(base, str(folder), execution_device="cpu")


def mapped(base: nn.Module, folder: Path) -> None:
    places = {"first": "cpu", "norm": "cpu", "last": "disk"}
    accelerate.dispatch_model(base, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


OFFLOADS: dict[str, Callable[[nn.Module, Path], None]] = {"cpu": to_cpu, "disk": to_disk, "map": mapped}


def trained(model: nn.Module, recipe: Any, probe: str) -> list[Tensor]:
    optimizer = recipe(model, lr=1e-2, mu=1e-2, probe=probe)
    for _ in range(3):
        optimizer.step(lambda: model(X).square().mean())
    return [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("recipe", [zoext.MeZO, zoext.AGZO])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_steps_are_those_of_the_model_that_is_all_there(
    offload: str, recipe: Any, probe: str, tmp_path: Path
) -> None:
    expected = trained(with_adapters(base_of()), recipe, probe)
    base = base_of()
    OFFLOADS[offload](base, tmp_path)
    assert any(weight.is_meta for weight in base.parameters())
    found = trained(with_adapters(base), recipe, probe)
    assert len(found) == len(expected) == 4
    assert all(map(torch.equal, found, expected))
    assert any(weight.is_meta for weight in base.parameters())


def test_a_run_is_recorded_and_replayed(tmp_path: Path) -> None:
    models = []
    for _ in range(2):
        base = base_of()
        to_cpu(base, tmp_path)
        models.append(with_adapters(base))
    optimizer = zoext.MeZO(models[0], lr=1e-2, mu=1e-2)
    with zoext.Trajectory(tmp_path / "run.jsonl", optimizer):
        for _ in range(3):
            optimizer.step(lambda: models[0](X).square().mean())
    present = with_adapters(base_of())
    for again in (models[1], present):
        zoext.replay(again, tmp_path / "run.jsonl")
        for name, weight in models[0].named_parameters():
            if weight.requires_grad:
                assert torch.equal(again.get_parameter(name), weight)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_the_advice_for_weights_that_train_keeps_them(offload: str, tmp_path: Path) -> None:
    expected = base_of().requires_grad_(True)
    base = base_of()
    OFFLOADS[offload](base, tmp_path)
    base.requires_grad_(True)
    with pytest.raises(ValueError, match=r"meta device.*remove_hook_from_module\(model, recurse=True\)"):
        zoext.MeZO(base)
    hooks.remove_hook_from_module(base, recurse=True)
    for weight, known in zip(base.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, known)
    zoext.MeZO(base).step(lambda: base(X).square().mean())
