"""Detects what a CUDA graph cannot capture: host synchronization and random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoext._runtime.randomness import RandomState


def capturable(
    closure: Callable[..., Any], device: torch.device, watching: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., Tensor]:
    """Wraps the closure in ``watching()``; raises if its value or its random numbers cannot be replayed."""

    def run(*copies: int) -> Tensor:
        before = RandomState(device)
        with watching():
            loss = closure(*copies)
        if read := before.read_since():
            raise RuntimeError(
                f"closure drew random numbers from {' and '.join(read)}, which a graph would not draw anew "
                "for each step and alike for its probes; switch dropout off with model.eval(), or step "
                "with optimizer.step(closure)"
            )
        if not isinstance(loss, Tensor) or loss.device != device:
            given = f"one on {loss.device}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(
                f"closure must return a tensor on {device}, not {given}: a graph cannot run Python code "
                "again; compute the loss on the device, or step with optimizer.step(closure)"
            )
        return loss

    return run


class HostWaits(TorchDispatchMode):
    """Raises a RuntimeError that names an operator that a CUDA graph cannot capture, before it runs.

    These are operators whose result the host must know, to branch on it or to allocate memory of that size,
    and operators that copy between pageable host memory and a device.
    """

    def found(self, wait: str) -> None:
        """Called before the host would wait, with a description of the operator."""
        raise RuntimeError(wait)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _reads_values(func, args, kwargs):
            self.found(f"{func} makes the host wait for values on the device")
        elif _crosses(func, args, kwargs):
            self.found(f"{func} copies between the host and the device, which makes the host wait")
        run: Callable[..., Any] = func
        return run(*args, **kwargs)


class NotedHostWaits(HostWaits):
    """Records the first such operator instead of raising, and lets all operators run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first: str | None = None

    def found(self, wait: str) -> None:
        self.first = self.first or wait


def _reads_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = func.overloadpacket.__name__
    if name in {"index", "index_put", "index_put_"}:  # a boolean index is first converted to positions
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if torch.Tag.data_dependent_output in func.tags:
        return True
    return torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None


def _crosses(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether pageable host memory is copied to or from a device; pinned memory may be copied."""
    name = func.overloadpacket.__name__
    if name == "lift_fresh":  # torch.tensor(...), which has copied already
        return bool(args[0].device.type != "cpu" and args[0].numel())
    if name == "_to_copy":
        source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
        non_blocking = kwargs.get("non_blocking", False)
    elif name == "copy_":
        source, target = args[1], args[0].device
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        return False
    if "cpu" not in {source.device.type, target.type} or source.device.type == target.type:
        return False
    return not (non_blocking and _is_pinned(source if source.device.type == "cpu" else args[0]))


def _is_pinned(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_pinned()
