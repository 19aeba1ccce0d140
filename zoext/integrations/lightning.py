"""Lightning: forward-only training of a LightningModule under automatic optimization.

Works with the packages ``lightning`` and ``pytorch_lightning``, and imports neither.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from zoext._engine import StepEngine, StepExecutor
from zoext.integrations._lightning_logs import Logs
from zoext.integrations._micro_batches import MicroBatch, mean_loss, not_run, samples, shares_of
from zoext.optimizer import ZerothOrderOptimizer, unwrap

__all__ = ["ZOModuleMixin"]


class ZOModuleMixin:
    """Trains a LightningModule with a zoext optimizer, under automatic optimization and without a backward.

    Name it before the LightningModule. Nothing else of the module changes:

        class Classifier(ZOModuleMixin, LightningModule):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Linear(10, 3)

            def training_step(self, batch, batch_idx):
                loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
                self.log("loss", loss)
                return loss

            def configure_optimizers(self):
                return zoext.MeZO(self, lr=1e-3)

    ``training_step`` runs once for each probe, without gradients. The hooks of Lightning run once for each
    batch or step, as with a first-order optimizer, and ``self.log`` logs the mean over the probes, once.
    ``on_before_optimizer_step`` runs before the weights move and finds no gradients; clipping does nothing.

    With ``accumulate_grad_batches``, micro-batches wait for the last one of their group. The step is that of
    one large batch with the mean loss, weighted by ``loss_weight``, also for the last and incomplete group of
    an epoch. While a micro-batch waits, ``outputs["loss"]`` in ``on_train_batch_end`` is NaN; with the step
    it is the mean loss of the group. AGZO combines the bases of the micro-batches, which approximates that
    of the large batch.

    Under manual optimization the training step is the module's own. Steps of ``self.optimizers()`` count in
    ``trainer.global_step``, and with the mixin also those of ``self.optimizers(use_pl_optimizer=False)``.

    Raises:
        TypeError: if ``configure_optimizers`` returns another optimizer, and for a class that names the mixin
            after the LightningModule.
        ValueError: for what cannot work without gradients: ``precision="16-mixed"`` (its gradient scaler),
            strategies that shard the model (FSDP, DeepSpeed, model parallelism), several processes without
            ``process_group="auto"``, and ``training_step(self, dataloader_iter)``. ``fit`` raises them before
            any batch runs.
    """

    trainer: Any
    device: torch.device
    automatic_optimization: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in names[: names.index("ZOModuleMixin")]:
            raise TypeError(
                f"class {cls.__name__}: name ZOModuleMixin before LightningModule among its bases"
            )
        for name, wrap in (("training_step", _probing), ("configure_optimizers", _checking)):
            function = getattr(cls, name, None)
            if function is not None and not hasattr(function, _MARK):
                setattr(cls, name, wrap(function))

    def loss_weight(self, batch: Any) -> float | Tensor:
        """The weight of a micro-batch in the mean over its group and over processes.

        Override it if the loss is a mean over something else than samples: over tokens, return their number.

        Args:
            batch: the first argument of ``training_step``.

        Returns:
            A number, or a tensor of one element. Default: the length of the first tensor in ``batch``.
        """
        return samples(batch)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """See ``LightningModule.log``; within ``training_step`` the mean over the probes is logged."""
        run = self._zo_run()
        if run.logs is None:
            super().log(name, value, *args, **kwargs)  # type: ignore[misc]
        else:
            run.logs.add(name, value, args, kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Does nothing under automatic optimization."""
        if not self.automatic_optimization:
            super().backward(loss, *args, **kwargs)  # type: ignore[misc]

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing under automatic optimization: there are no gradients to clip."""
        if not self.automatic_optimization:
            super().clip_gradients(*args, **kwargs)  # type: ignore[misc]

    def _zo_run(self) -> _Run:
        run: _Run | None = self.__dict__.get("_zo_state")
        if run is None:
            run = self.__dict__["_zo_state"] = _Run()
        return run

    def _zo_prepare(self, optimizers: Any) -> None:
        """Checks the optimizer, and has it run the closure of Lightning once."""
        for hook in self._zo_run().hooks:
            hook.remove()  # of the last fit
        run = self.__dict__["_zo_state"] = _Run()
        if getattr(self, "_trainer", None) is None:  # not called by a fit
            return
        for optimizer in tree_leaves(optimizers):
            if not isinstance(optimizer, Optimizer):
                continue
            if self.automatic_optimization:
                _check_training_step(self.training_step)  # type: ignore[attr-defined]
            elif not isinstance(optimizer, ZerothOrderOptimizer):
                continue
            _check_trainer(self.trainer, unwrap(optimizer))
            run.hooks.append(optimizer.register_step_pre_hook(self._zo_before_step))

    def _zo_before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs the closure of Lightning, whose training step makes the estimate that the step applies."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not self._zo_is_training():
            return None
        if not self.automatic_optimization:
            if not _is_of_lightning(closure):  # a step that Lightning does not see, nor count
                progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
                progress.increment_ready()
                progress.increment_completed()
            return None
        if closure is None:
            return None
        run = self._zo_run()
        run.optimizer, run.dtype = unwrap(optimizer), torch.get_default_dtype()
        try:
            closure()
        finally:
            run.optimizer = None
        is_skipped, run.is_skipped = run.is_skipped, False
        return (args[0], *[_Skip()] * is_skipped), {}

    def _zo_is_training(self) -> bool:
        run = self._zo_run()
        return bool(run.hooks) and bool(self.trainer.training)

    def _zo_training_step(self, micro_batch: MicroBatch) -> Any:
        """Makes the estimate of the group that ``micro_batch`` completes; until then, keeps it."""
        run = self._zo_run()
        run.add(micro_batch, self.trainer.current_epoch)
        optimizer = run.optimizer
        if optimizer is None:
            return not_run(self.device)
        group, run.group = run.group, []
        shares = shares_of([each.weight for each in group], self.device, optimizer.engine.ranks.data)
        logs = Logs(cast("nn.Module", self), [samples(each.args[1]) for each in group])
        outputs: list[Any] = []  # of the last micro-batch in the first probe

        def closure() -> Tensor | float:
            losses = []
            for index, each in enumerate(group):
                with self.trainer.precision_plugin.train_step_context(), logs.of(index):
                    output = each.run()
                losses.append(_loss_in(output, len(group)))
            if not outputs:
                outputs.append(output)
            return mean_loss(losses, shares)

        run.logs = logs
        try:
            with _outside_training_step(self.device.type, run.dtype):
                loss = optimizer.estimate(closure).loss
        except _SkippedError:
            run.is_skipped = True
            return None
        finally:
            run.logs = None
        logs.emit(super().log)  # type: ignore[misc]
        loss = loss * self.trainer.accumulate_grad_batches  # Lightning divides by it
        return {**outputs[0], "loss": loss} if isinstance(outputs[0], Mapping) else loss


class _Run:
    """What a fit needs besides the module. A copy or a pickle of the module gets a new one.

    Attributes:
        group: the micro-batches that wait for the step.
        epoch: the epoch that they belong to.
        optimizer: the optimizer while it steps.
        dtype: torch's default dtype outside the training step.
        logs: collects what the training step logs while probes run.
        is_skipped: whether the training step returned None.
        hooks: those of the optimizers; none before a fit.
    """

    def __init__(self) -> None:
        self.group: list[MicroBatch] = []
        self.epoch = 0
        self.optimizer: ZerothOrderOptimizer | None = None
        self.dtype = torch.float32
        self.logs: Logs | None = None
        self.is_skipped = False
        self.hooks: list[RemovableHandle] = []

    def add(self, micro_batch: MicroBatch, epoch: int) -> None:
        """Adds a micro-batch to the group. Those of another epoch were left by an interruption."""
        if epoch != self.epoch:
            self.group, self.epoch = [], epoch
        self.group.append(micro_batch)

    def __reduce__(self) -> tuple[type[_Run], tuple[()]]:
        return _Run, ()


class _SkippedError(Exception):
    """A training step returned None."""


class _Skip(StepExecutor):
    """Takes no step."""

    def advance(self, engine: StepEngine) -> Tensor:
        return torch.full((), torch.nan)


_MARK = "_zo_wrapped"


def _probing(training_step: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: ZOModuleMixin, batch: Any, *args: Any, **kwargs: Any) -> Any:
        is_of_the_loop = getattr(self, "_current_fx_name", None) == "training_step"  # and not of another hook
        is_probing = self._zo_run().logs is not None
        if is_probing or not (is_of_the_loop and self.automatic_optimization and self._zo_is_training()):
            return training_step(self, batch, *args, **kwargs)
        compiler = getattr(self, "_compiler_ctx", None)  # set by Lightning for torch.compile(module)
        function = compiler["dynamo_ctx"](training_step) if compiler else training_step
        return self._zo_training_step(
            MicroBatch(function, (self, batch, *args), kwargs, self.loss_weight(batch))
        )

    # torch.compile(module) compiles all that training_step calls, which must not include the optimizer.
    disabled: Callable[..., Any] = torch.compiler.disable(wrapper)
    functools.update_wrapper(disabled, training_step)
    setattr(disabled, _MARK, True)
    return disabled


def _checking(configure_optimizers: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(configure_optimizers)
    def wrapper(self: ZOModuleMixin) -> Any:
        optimizers = configure_optimizers(self)
        self._zo_prepare(optimizers)
        return optimizers

    setattr(wrapper, _MARK, True)
    return wrapper


def _check_trainer(trainer: Any, optimizer: ZerothOrderOptimizer) -> None:
    """Raises a ValueError for a Trainer that needs gradients, or whose replicas would diverge."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            "Trainer(precision='16-mixed') scales gradients, and there are none; pass "
            "precision='bf16-mixed', '16-true' or 'bf16-true'"
        )
    strategy = type(trainer.strategy)
    if not any(base.__name__ in _STRATEGIES for base in strategy.__mro__):
        raise ValueError(
            f"Trainer(strategy=...): {strategy.__name__} does not keep whole weights in each process, which "
            "the probes displace; pass strategy='ddp' or 'auto'"
        )
    if optimizer.engine.ranks.probes is not None:
        raise ValueError(
            "probe_group: the Trainer gives every process a batch of its own, and the ranks of this group "
            "(the dimension 'probe' of a mesh) need the same one; leave it out, which averages the losses "
            "over all processes, or train without a Trainer"
        )
    if trainer.world_size > 1 and optimizer.engine.ranks.data is None:
        raise ValueError(
            f"the Trainer runs {trainer.world_size} processes, whose weights would diverge; pass "
            "process_group='auto' to the optimizer, which averages the losses over them"
        )


def _check_training_step(training_step: Callable[..., Any]) -> None:
    if "dataloader_iter" in inspect.signature(training_step).parameters:
        raise ValueError(
            "training_step(self, dataloader_iter) fetches another batch at each probe; take a batch: "
            "training_step(self, batch, batch_idx)"
        )


def _is_of_lightning(closure: object) -> bool:
    """Whether LightningOptimizer called ``step``: it wraps the closure, also if there is none."""
    return isinstance(closure, functools.partial) and closure.func.__name__ == "_wrap_closure"


_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}


def _loss_in(output: Any, count: int) -> Any:
    """The loss that a training step returned."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None and isinstance(output, Mapping):
        raise ValueError("training_step returned a dict without 'loss'")
    if loss is None and count > 1:
        raise ValueError(
            "training_step returned None for a micro-batch, which skips a batch only with "
            "accumulate_grad_batches=1; leave such batches out of the data"
        )
    if loss is None:
        raise _SkippedError
    return loss


@contextmanager
def _outside_training_step(device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """Undoes what precision plugins set for forwards, for the computations of the optimizer."""
    within = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(within)
