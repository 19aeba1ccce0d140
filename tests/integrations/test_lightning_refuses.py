"""What cannot be trained without gradients is refused before any batch runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zoext
from support.lightning_modules import RECIPES, Module, fit, loader, loss_of, net, pl, weights_of
from zoext.integrations.lightning import ZOModuleMixin


class Validating(Module):
    """Its first batch would be that of the sanity check."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.hooks["validation_step"] += 1

    def val_dataloader(self) -> Any:
        return loader(14)


def refused(module: Module, error: type[Exception], message: str, **options: Any) -> None:
    with pytest.raises(error, match=message):
        fit(module, **options)
    assert not module.hooks


def test_the_gradient_scaler() -> None:
    scaled = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refused(Validating(), ValueError, "precision='16-mixed'.*pass precision='bf16-mixed'", plugins=[scaled])


def test_another_optimizer() -> None:
    module = Validating(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type, return-value]
    refused(module, TypeError, "must be a ZerothOrderOptimizer")


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_that_shard(name: str) -> None:
    module, strategy = Validating(), type(name, (), {})()
    module.trainer = SimpleNamespace(strategy=strategy, precision_plugin=None, world_size=2)
    with pytest.raises(ValueError, match=f"{name} does not keep whole weights"):
        module.configure_optimizers()


def test_several_processes_without_a_process_group() -> None:
    module = Validating()
    strategy = object.__new__(pl.strategies.DDPStrategy)
    module.trainer = SimpleNamespace(strategy=strategy, precision_plugin=None, world_size=2)
    with pytest.raises(ValueError, match=r"2 processes, whose weights would diverge.*process_group='auto'"):
        module.configure_optimizers()


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_training_step_that_fetches_batches() -> None:
    class Fetching(Validating):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return loss_of(self.net, *batch)

    refused(Fetching(), ValueError, "dataloader_iter.*fetches another batch at each probe")


def test_a_dict_without_a_loss() -> None:
    class Lossless(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"value": 1}

    with pytest.raises(ValueError, match="a dict without 'loss'"):
        fit(Lossless())


def test_a_loss_that_is_not_finite() -> None:
    class Infinite(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) / 0

    module = Infinite(zoext.MeZO)
    with pytest.raises(FloatingPointError, match="was not finite"):
        fit(module)


class Plain(pl.LightningModule):  # type: ignore[misc, name-defined]
    """Without the mixin."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: Any) -> Any:
        return loss_of(self.net, *batch)

    def configure_optimizers(self) -> Any:
        return RECIPES["MeZO"](self)


def test_a_plain_module_that_accumulates() -> None:
    """The closures of the other micro-batches would be lost."""
    module = Plain()
    before = weights_of(module)
    with pytest.raises(
        RuntimeError, match=r"one micro-batch in 2 only.*ZOModuleMixin before the LightningModule"
    ):
        fit(module, accumulate_grad_batches=2)
    assert torch.equal(weights_of(module), before)


def test_the_mixin_after_the_lightning_module() -> None:
    with pytest.raises(TypeError, match="name ZOModuleMixin before LightningModule"):

        class Swapped(pl.LightningModule, ZOModuleMixin):  # type: ignore[misc, name-defined]
            pass
