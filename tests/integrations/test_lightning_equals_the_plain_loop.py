"""ZOModuleMixin trains a LightningModule to the bits of the plain loop, without a backward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import zoext
from support.lightning_modules import (
    RECIPES,
    Module,
    fit,
    loader,
    loss_of,
    net,
    pl,
    plain_run,
    scheduled,
    weights_of,
)
from zoext.integrations.lightning import ZOModuleMixin


@pytest.mark.parametrize("recipe", ["MeZO", "LOZO", "AGZO", "AdaMeZO", "MeZOGreedy"])
def test_every_recipe(recipe: str) -> None:
    module = Module(RECIPES[recipe])
    trainer = fit(module)
    weights, losses = plain_run(RECIPES[recipe])
    assert torch.equal(weights_of(module), weights)
    assert module.losses == losses
    assert trainer.global_step == trainer.optimizers[0].param_groups[0]["step"] == 8


def test_hooks_run_once_and_nothing_has_a_gradient() -> None:
    seen: list[bool] = []

    class Watching(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            seen.append(torch.is_grad_enabled() or loss.requires_grad)
            return loss

        def on_after_backward(self) -> None:
            self.hooks["after_backward"] += 1

    module = Watching()
    fit(module, max_epochs=1)
    assert module.hooks.pop("training_step") == 8
    assert set(module.hooks.values()) == {4}
    assert len(module.hooks) == 5
    assert not any(seen)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_theta_is_not_displaced_in_a_hook() -> None:
    class Looking(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.before = weights_of(self)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert torch.equal(weights_of(self), self.before)
            assert optimizer is self.trainer.optimizers[0]
            super().on_before_optimizer_step(optimizer)

    module = Looking()
    fit(module)
    assert module.hooks["before_optimizer_step"] == 8


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_changes_nothing(algorithm: str) -> None:
    module = Module()
    fit(module, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    assert torch.equal(weights_of(module), plain_run(RECIPES["MeZO"])[0])


def test_mixed_precision_is_that_of_forwards_only() -> None:
    module = Module(RECIPES["AGZO"])
    fit(module, precision="bf16-mixed", max_epochs=1)
    model = nn.ModuleDict({"net": net()})
    optimizer = RECIPES["AGZO"](model)
    scheduler = scheduled(optimizer)
    for batch in loader(8):

        def closure(batch: Any = batch) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return loss_of(model["net"], *batch)

        optimizer.step(closure)
        scheduler.step()
    assert torch.equal(weights_of(module), weights_of(model))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions(precision: str) -> None:
    module = Module(lambda model: zoext.MeZO(model, lr=0.1, mu=0.05))
    before = module.net[0].weight.clone()
    fit(module, precision=precision, max_epochs=1)
    assert torch.get_default_dtype() == torch.float32
    assert not torch.equal(module.net[0].weight, before.to(module.net[0].weight.dtype))


def test_a_module_that_only_adds_the_mixin() -> None:
    class FirstOrder(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any) -> Any:
            return loss_of(self.net, *batch)

        def configure_optimizers(self) -> Any:
            return RECIPES["LOZO"](self)

    class ForwardOnly(ZOModuleMixin, FirstOrder):  # type: ignore[misc]
        pass

    module, model = ForwardOnly(), nn.ModuleDict({"net": net()})
    fit(module, max_epochs=1)
    optimizer = RECIPES["LOZO"](model)
    for batch in loader(8):
        optimizer.step(lambda batch=batch: loss_of(model["net"], *batch))
    assert torch.equal(weights_of(module), weights_of(model))


def test_a_batch_that_the_training_step_changes() -> None:
    class Popping(Module):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"x": batch[0], "y": batch[1]}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.net, batch.pop("x"), batch.pop("y"))

    module = Popping()
    fit(module)
    assert torch.equal(weights_of(module), plain_run(RECIPES["MeZO"])[0])


def test_outputs_of_a_dict() -> None:
    class Mapping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "count": len(batch[0])}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert outputs["count"] == len(batch[0])
            super().on_train_batch_end(outputs, batch, batch_idx)

    module = Mapping()
    fit(module)
    assert module.losses == plain_run(RECIPES["MeZO"])[1]


def test_a_training_step_that_returns_none_skips_the_batch() -> None:
    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert bool(outputs) != bool(batch_idx % 2)

    module = Skipping()
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        trainer = fit(module)
    assert trainer.optimizers[0].param_groups[0]["step"] == 4


def test_the_step_outside_a_fit_is_the_users() -> None:
    module = Module()
    with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
        assert module.training_step((torch.ones(2, 6), torch.tensor([0, 1])), 0).requires_grad
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.step(lambda: loss_of(module.net, torch.ones(2, 6), torch.tensor([0, 1])))
    assert module.hooks["training_step"] == 1


def test_a_validation_that_calls_the_training_step() -> None:
    class Validating(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.training_step(batch, batch_idx).isfinite()

        def val_dataloader(self) -> Any:
            return loader(14)

    module = Validating()
    fit(module, num_sanity_val_steps=1)
    assert torch.equal(weights_of(module), plain_run(RECIPES["MeZO"])[0])


def test_a_hook_that_calls_the_training_step() -> None:
    class Hooked(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.net, *batch)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert torch.equal(self.training_step(batch, batch_idx), loss_of(self.net, *batch))

    module = Hooked()
    fit(module)
    assert torch.equal(weights_of(module), plain_run(RECIPES["MeZO"])[0])


def test_copies_do_not_belong_to_the_fit() -> None:
    module = Module(zoext.MeZO)
    fit(module, max_epochs=1)
    module.trainer = None
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(weights_of(copied), weights_of(module))
        with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
            assert copied.training_step((torch.ones(2, 6), torch.tensor([0, 1])), 0).requires_grad


def test_a_second_fit_continues() -> None:
    optimizers: list[Any] = []

    class Again(Module):
        def configure_optimizers(self) -> Any:
            optimizers.append(optimizers[0] if optimizers else self.make(self))
            return optimizers[0]

    module = Again()
    fit(module, max_epochs=1)
    fit(module, max_epochs=1)
    assert module.hooks["before_optimizer_step"] == optimizers[0].param_groups[0]["step"] == 8
    assert module.hooks["training_step"] == 16


def test_a_compiled_module_stays_compiled() -> None:
    runs = [0]

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        def run(*args: Any) -> Any:
            runs[0] += 1
            return graph.forward(*args)

        return run

    class Uncounted(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.net, *batch)

    module = Uncounted()
    trainer = fit(torch.compile(module, backend=backend))
    assert torch.equal(weights_of(module), plain_run(RECIPES["MeZO"])[0])
    assert runs[0] >= trainer.global_step * 2 == 16


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*isinstance.treespec")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_package_pytorch_lightning() -> None:
    other = pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning")

    class Other(ZOModuleMixin, other.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any) -> Any:
            loss = loss_of(self.net, *batch)
            self.log("loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = RECIPES["MeZO"](self)
            return [optimizer], [{"scheduler": scheduled(optimizer), "interval": "step"}]

    module = Other()
    names = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    trainer = other.Trainer(max_epochs=2, accelerator="cpu", **dict.fromkeys(names, False))
    trainer.fit(module, loader(8))
    weights, losses = plain_run(RECIPES["MeZO"])
    assert torch.equal(weights_of(module), weights)
    sizes = (8, 8, 8, 4)
    mean = sum(size * loss for size, loss in zip(sizes, losses[4:], strict=True)) / 28
    assert trainer.callback_metrics["loss_epoch"].item() == pytest.approx(mean, rel=1e-6)


def test_averaging_of_weights() -> None:
    class Unscheduled(Module):
        def configure_optimizers(self) -> Any:
            return self.make(self)

    module = Unscheduled()
    average = pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    trainer = fit(module, callbacks=[average], max_epochs=3)
    assert trainer.global_step == trainer.optimizers[0].param_groups[0]["step"] == 12
