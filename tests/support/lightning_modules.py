"""A small LightningModule that is trained forward-only, and the plain loop that it must equal."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

pl = pytest.importorskip("lightning.pytorch", reason="needs Lightning")

from zoext.integrations.lightning import ZOModuleMixin  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

X = torch.randn(28, 6, generator=torch.Generator().manual_seed(3))
Y = torch.randint(0, 3, (28,), generator=torch.Generator().manual_seed(4))

MakeOptimizer = Callable[[nn.Module], zoext.ZerothOrderOptimizer]

RECIPES: dict[str, MakeOptimizer] = {
    "MeZO": lambda model: zoext.MeZO(model, lr=0.03, mu=0.02, weight_decay=0.1, seed=5),
    "LOZO": lambda model: zoext.LOZO(model, lr=0.02, mu=0.03, seed=6),
    "AGZO": lambda model: zoext.AGZO(model, lr=0.02, mu=0.01, seed=7),
    "AdaMeZO": lambda model: zoext.AdaMeZO(model, lr=0.004, mu=0.02, seed=8),
    "MeZOGV": lambda model: zoext.MeZOGV(model, lr=0.02, mu=0.02, seed=9),
    "MeZOGreedy": lambda model: zoext.MeZOGreedy(model, lr=0.03, mu=0.02, seed=10),
    "residual": lambda model: zoext.MeZO(model, lr=0.03, mu=0.02, precision="residual", seed=11),
}


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)


class Module(ZOModuleMixin, pl.LightningModule):  # type: ignore[misc, name-defined]
    """Counts its hooks, and keeps the losses that it hands out."""

    def __init__(self, make: MakeOptimizer = RECIPES["MeZO"]) -> None:
        super().__init__()
        self.net = net()
        self.make = make
        self.hooks: Counter[str] = Counter()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.hooks["training_step"] += 1
        loss = loss_of(self.net, *batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduled(optimizer), "interval": "step"},
        }

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks["before_optimizer_step"] += 1

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.hooks["before_zero_grad"] += 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.hooks["train_batch_start"] += 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.hooks["train_batch_end"] += 1
        self.losses.append(outputs["loss"].item())


def loader(batch_size: int, count: int = 28) -> torch.utils.data.DataLoader[Any]:
    data = torch.utils.data.TensorDataset(X[:count], Y[:count])
    return torch.utils.data.DataLoader(data, batch_size)


def fit(
    module: Any, batch_size: int | None = 8, *, count: int = 28, ckpt_path: Any = None, **options: Any
) -> Any:
    """Fits ``module`` and returns its Trainer. Without a batch size the module has a loader of its own."""
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", **dict.fromkeys(quiet, False)}
    with warnings.catch_warnings():
        for message in (".*does not have many workers", ".*logging interval", ".*isinstance.treespec"):
            warnings.filterwarnings("ignore", message)
        trainer = pl.Trainer(**{**defaults, **options})
        trainer.fit(module, loader(batch_size, count) if batch_size else None, ckpt_path=ckpt_path)
    return trainer


def weights_of(module: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def plain_run(make: MakeOptimizer, batch_size: int = 8, epochs: int = 2) -> tuple[Tensor, list[float]]:
    """The weights and the losses of the loop that the module must equal."""
    model = nn.ModuleDict({"net": net()})
    optimizer = make(model)
    scheduler = scheduled(optimizer)
    losses = []
    for _ in range(epochs):
        for batch in loader(batch_size):
            losses.append(optimizer.step(lambda batch=batch: loss_of(model["net"], *batch)).item())
            scheduler.step()
    return weights_of(model), losses
