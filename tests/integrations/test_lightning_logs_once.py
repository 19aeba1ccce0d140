"""What a training step logs is logged once, as the mean over its probes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoext
from support.lightning_modules import Module, fit, pl, weights_of


class Logging(Module):
    """Keeps what is logged after each batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda model: zoext.MeZO(model, lr=0.05, mu=0.03, seed=1))
        self.logged: list[float] = []
        self.estimated: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.losses[-1] == self.losses[-1]:
            self.logged.append(self.trainer.callback_metrics["loss_step"].item())
            self.estimated.append(self.trainer.optimizers[0].last_estimate.loss.item())


def test_the_loss_of_a_batch() -> None:
    module = Logging()
    trainer = fit(module, 7, max_epochs=1)
    assert module.logged == module.losses == module.estimated
    mean = sum(module.losses) / 4
    assert trainer.callback_metrics["loss_epoch"].item() == pytest.approx(mean, rel=1e-6)


def test_batches_of_a_group_count_by_their_samples() -> None:
    module = Logging()
    trainer = fit(module, 5, accumulate_grad_batches=2, max_epochs=1)  # 5 + 5, 5 + 5, 5 + 3
    mean = sum(loss * size for loss, size in zip(module.estimated, (10, 10, 8), strict=True)) / 28
    assert trainer.callback_metrics["loss_epoch"].item() == pytest.approx(mean, rel=1e-6)


def test_several_values() -> None:
    class Several(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log_dict({"count": float(len(batch[0])), "twice": 2 * loss}, on_step=False, on_epoch=True)
            self.log("total", torch.tensor(3.0), reduce_fx="sum", on_step=False, on_epoch=True)
            loss *= 1  # in place: what was logged stays
            return loss

    module = Several()
    metrics = fit(module, 7, max_epochs=1).callback_metrics
    assert metrics["count"] == 7
    assert metrics["total"] == 12
    assert metrics["twice"].item() == pytest.approx(2 * metrics["loss_epoch"].item(), rel=1e-6)


def test_metrics_see_each_sample_once() -> None:
    torchmetrics = pytest.importorskip("torchmetrics", reason="needs torchmetrics")

    class Metrics(Logging):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torchmetrics.SumMetric()
            self.labels = torchmetrics.CatMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen(float(len(batch[0])))
            self.labels.update(batch[1])
            self.log("seen", self.seen, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            assert len(self.labels.compute()) == 28

    for accumulate in (1, 3):
        module = Metrics()
        metrics = fit(module, 7, max_epochs=1, accumulate_grad_batches=accumulate).callback_metrics
        assert metrics["seen_step"] == 7
        assert metrics["seen_epoch"] == 28


def test_validation_logs_as_ever() -> None:
    class Validating(Logging):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("valid", 2.0)

        def val_dataloader(self) -> Any:
            from support.lightning_modules import loader

            return loader(14)

    module = Validating()
    before = weights_of(module)
    assert fit(module, max_epochs=1).callback_metrics["valid"] == 2
    assert not torch.equal(before, weights_of(module))


def test_callbacks_watch_what_is_logged() -> None:
    module = Logging()
    monitor = pl.callbacks.EarlyStopping("loss_epoch", patience=1, min_delta=10.0)
    trainer = fit(module, callbacks=[monitor], max_epochs=5)
    assert trainer.current_epoch == 2
