"""strategy="ddp": the processes take the step of all their batches, and keep the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoext
from support.lightning_modules import RECIPES, Module, fit, loader, plain_run, weights_of


class Saving(Module):
    def __init__(self, recipe: str, size: int, folder: Path) -> None:
        super().__init__(RECIPES[recipe])
        self.size = size
        self.folder = folder

    def train_dataloader(self) -> Any:
        data = loader(1).dataset
        sampler = torch.utils.data.DistributedSampler(data, 2, self.global_rank, shuffle=False)
        return torch.utils.data.DataLoader(data, self.size, sampler=sampler)

    def on_fit_end(self) -> None:
        assert all(parameter.grad is None for parameter in self.parameters())
        end: dict[str, Any] = {"weights": weights_of(self), "losses": torch.tensor(self.losses)}
        torch.save(end, self.folder / f"{self.global_rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(("recipe", "size", "accumulate"), [("MeZO", 4, 1), ("MeZOGreedy", 2, 2)])
def test_two_processes_are_one_large_batch(recipe: str, size: int, accumulate: int, tmp_path: Path) -> None:
    """Of 8 samples; the last of an epoch has 4."""
    module = Saving(recipe, size, tmp_path)
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    fit(module, None, accumulate_grad_batches=accumulate, **options)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    weights, losses = plain_run(RECIPES[recipe])
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], weights, rtol=1e-4, atol=2e-6)
    told = first["losses"][first["losses"].isfinite()]
    torch.testing.assert_close(told, torch.tensor(losses), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_probes_cannot_be_dealt_out() -> None:
    """The ranks of a probe group need the same batch."""
    module = Module(lambda module: zoext.MeZO(module, probe_group=torch.distributed.group.WORLD))
    with pytest.raises(Exception, match="probe_group: the Trainer gives every process a batch of its own"):
        fit(module, 4, strategy="ddp_fork", devices=2)
