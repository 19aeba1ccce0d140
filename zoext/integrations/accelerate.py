"""Accelerate: a training loop whose steps take closures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from torch import Tensor, nn

from zoext.integrations._micro_batches import MicroBatch, mean_loss, samples, shares_of
from zoext.optimizer import ZerothOrderOptimizer, unwrap

__all__ = ["ZOAcceleratedOptimizer", "ZOAccelerator"]

_REPLICATING = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}


class ZOAccelerator(Accelerator):  # type: ignore[misc]
    """An Accelerator for zoext optimizers: ``optimizer.step`` takes a loss function and a batch.

        accelerator = ZOAccelerator(gradient_accumulation_steps=4)
        model, optimizer, loader = accelerator.prepare(model, zoext.MeZO(model, lr=1e-6), loader)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = optimizer.step(lambda batch: model(**batch).loss, batch)

    The arguments are those of ``accelerate.Accelerator``. Delete ``accelerator.backward(loss)``; calls of
    ``clip_grad_norm_``, ``clip_grad_value_`` and ``optimizer.zero_grad`` have no effect. ``prepare`` does not
    wrap a model in DistributedDataParallel, which would allocate gradients: it copies the weights of the
    main process to the others.

    Raises:
        ValueError: for ``mixed_precision="fp16"``, whose scaler needs gradients, and for launches that shard
            the model (FSDP, DeepSpeed, Megatron-LM) or that do not run on CPU or CUDA.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision='fp16' scales gradients, and there are none; pass 'bf16', or 'no' with a "
                "model in float16"
            )
        if self.distributed_type not in _REPLICATING:
            raise ValueError(
                f"distributed_type is {self.distributed_type.value}, which does not keep whole weights in "
                "each process, or does not run on CPU or CUDA; launch with --multi_gpu or --cpu"
            )

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Places the model and its autocast, and copies the weights of the main process to the others."""
        prepared: nn.Module = super().prepare_model(model, device_placement, evaluation_mode=True)
        if self.num_processes > 1:
            with torch.no_grad():
                broadcast([*prepared.parameters(), *prepared.buffers()])
        return prepared

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> torch.optim.Optimizer:
        """Wraps a zoext optimizer.

        Raises:
            TypeError: for another optimizer.
            ValueError: if several processes train, and the optimizer has ``process_group=None`` or deals its
                probes out over them, for which their batches would have to be the same.
        """
        if isinstance(optimizer, ZOAcceleratedOptimizer):
            return optimizer
        inner = unwrap(optimizer)
        if inner.engine.ranks.probes is not None:
            raise ValueError(
                "probe_group: Accelerate gives every process a batch of its own, and the ranks of this group "
                "(the dimension 'probe' of a mesh) need the same one; leave it out, which averages the "
                "losses over all processes, or train without an Accelerator"
            )
        if self.num_processes > 1 and inner.engine.ranks.data is None:
            raise ValueError(
                f"{self.num_processes} processes train, whose weights would diverge; pass "
                "process_group='auto' to the optimizer, which averages the losses over them"
            )
        wrapped = ZOAcceleratedOptimizer(
            inner, self.device_placement if device_placement is None else device_placement
        )
        self._optimizers.append(wrapped)
        return wrapped

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Raises a RuntimeError, because a forward-only step has no backward."""
        raise RuntimeError(
            "accelerator.backward(loss): delete this line, and have the optimizer run the forwards: "
            "optimizer.step(lambda batch: loss_of(model, batch), batch)"
        )

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Does nothing, because there are no gradients."""


class ZOAcceleratedOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """The optimizer that ``ZOAccelerator.prepare`` returns; the zoext optimizer is its ``optimizer``."""

    optimizer: ZerothOrderOptimizer

    def __init__(self, optimizer: ZerothOrderOptimizer, device_placement: bool = True) -> None:
        super().__init__(optimizer, device_placement)
        self._group: list[MicroBatch] = []

    def step(
        self,
        closure: Callable[..., Tensor | float] | None = None,
        *batch: Any,
        weight: float | Tensor | None = None,
    ) -> Tensor | None:
        """Takes a step with the loss ``closure(*batch)``.

        Within ``accelerator.accumulate``, micro-batches wait for the last one of their group. The step is
        that of one large batch with the mean loss, also for the last and incomplete group of an epoch.

        Args:
            closure: a function of ``batch`` that returns the mean loss. It runs several times, with gradients
                disabled. None applies the pending estimates of ``zoext.unwrap(optimizer)``.
            batch: the arguments of ``closure``. A closure that finds its batch in a variable of the loop
                would run with a later one, so an accumulating loop must pass the batch.
            weight: the weight of the loss in the mean over the group and over processes: how many things it
                is a mean over, such as tokens. Default: the length of the first tensor in ``batch``.

        Returns:
            The mean loss of the group and of all processes; None while micro-batches wait.

        Raises:
            TypeError: if an accumulating loop passes no batch. Exceptions of
                ``ZerothOrderOptimizer.step`` also apply.
        """
        if closure is None:
            return self.optimizer.step() if self.gradient_state.sync_gradients else None
        if not batch and self.gradient_state.num_steps > 1:
            raise TypeError(
                "step(closure): with gradient_accumulation_steps > 1 the closure runs when its group is "
                "complete, and variables of the loop have changed; pass the batch: "
                "step(lambda batch: model(**batch).loss, batch)"
            )
        weight = samples(batch) if weight is None else weight
        self._group.append(MicroBatch(closure, batch, {}, weight))
        if not self.gradient_state.sync_gradients:
            return None
        group, self._group = self._group, []
        shares = shares_of(
            [each.weight for each in group],
            self.accelerator_state.device,
            self.optimizer.engine.ranks.data,
        )
        return self.optimizer.step(lambda: mean_loss([each.run() for each in group], shares))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Drops micro-batches that wait, and loads ``state_dict``."""
        self._group = []
        super().load_state_dict(state_dict)
