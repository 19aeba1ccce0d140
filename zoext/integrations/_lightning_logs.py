"""What a ``training_step`` that runs once for each probe logs: the mean over the probes, once."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Logs:
    """Collects the calls of ``self.log`` in all probes of a group of micro-batches.

    The metrics of torchmetrics have the state that the first probe leaves, so that no sample counts twice.

    Args:
        module: the LightningModule.
        sizes: the number of samples of each micro-batch.
    """

    def __init__(self, module: nn.Module, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._calls: list[dict[str, _Call]] = [{} for _ in sizes]
        self._has_run = [False] * len(sizes)
        self._current = 0
        kind = getattr(sys.modules.get("torchmetrics"), "Metric", None)
        self._metrics = [part for part in module.modules() if isinstance(part, kind)] if kind else []

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """The block in which the ``training_step`` of a micro-batch runs."""
        self._current = index
        states = [_state_of(metric) for metric in self._metrics] if self._has_run[index] else None
        try:
            yield
        finally:
            if states is not None:
                for metric, state in zip(self._metrics, states, strict=True):
                    vars(metric).clear()
                    vars(metric).update(state)
        self._has_run[index] = True

    def add(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds a call of ``self.log``."""
        if isinstance(value, Tensor):
            value = value.detach().clone()  # the step may go on to change it in place
        calls = self._calls[self._current]
        if name not in calls:
            calls[name] = _Call([], args, kwargs)
        calls[name].values.append(value)

    def emit(self, log: Callable[..., None]) -> None:
        """Calls ``log`` once for each name and micro-batch."""
        for size, calls in zip(self._sizes, self._calls, strict=True):
            for name, call in calls.items():
                kwargs = dict(call.kwargs)
                if len(self._sizes) > 1 and kwargs.get("batch_size") is None:
                    kwargs["batch_size"] = size  # Lightning would take that of the last micro-batch
                log(name, call.mean(), *call.args, **kwargs)


class _Call:
    """The calls of ``self.log`` with one name, and the arguments of the first."""

    def __init__(self, values: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.values = values
        self.args = args
        self.kwargs = kwargs

    def mean(self) -> Any:
        first = self.values[0]
        if not isinstance(first, Tensor | numbers.Number):
            return first
        device = first.device if isinstance(first, Tensor) else None
        stacked = torch.stack([torch.as_tensor(value, device=device) for value in self.values])
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32)).mean(0)


def _state_of(metric: nn.Module) -> dict[str, Any]:
    """The attributes of a metric, with copies of what an update may change in place."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return list(value) if isinstance(value, list) else value

    return {name: copied(value) for name, value in vars(metric).items()}
