"""Replaces the forwards of the modules that own weights, and of dropout, while a closure runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoext.probes._batched.block import Block
from zoext.probes._batched.errors import BatchedProbeError
from zoext.probes._batched.observed import Own
from zoext.probes._batched.replaced import Replaced

_MIXES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPS_OTHERWISE = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


@contextmanager
def installed(
    outermost: Iterable[nn.Module],
    modules: Iterable[nn.Module],
    owned: dict[nn.Module, list[Own]],
    block: Block,
) -> Iterator[None]:
    """The block in which ``block`` runs those of the modules that own weights that move.

    ``outermost`` has the modules that the closure may call itself.
    """
    name = block.name
    own_forwards: dict[nn.Module, Any] = {}
    handles: list[RemovableHandle] = []

    # Functions, since a copy of a module would copy the block that a method is bound to.
    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        block.begin(module, args, kwargs)

    def end(*_: Any) -> None:
        block.end()

    try:
        for module in outermost:
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(end, always_call=True))
        for module in modules:
            run = _replacement(module, owned, block)
            if run is not None:
                own_forwards[module] = original = module.__dict__.get("forward")
                module.__dict__["forward"] = Replaced(run, original, module, name)
        yield
    finally:
        for module, forward in own_forwards.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
        for handle in handles:
            handle.remove()


def _replacement(
    module: nn.Module, owned: dict[nn.Module, list[Own]], block: Block
) -> Callable[..., Any] | None:
    forward = module.forward
    if module.training:
        if isinstance(module, _MIXES):
            return _refusing(block, module, "normalizes over all copies in training; call its eval()")
        if isinstance(module, _DROPS) and module.p > 0:
            return partial(_dropped_alike, block, module, forward)
        if isinstance(module, _DROPS_OTHERWISE):
            return _refusing(block, module, "draws other random numbers for each copy; call its eval()")
    if module in owned:
        return block.runner(module, owned[module], forward)
    return None


def _refusing(block: Block, module: nn.Module, why: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise BatchedProbeError(f"{block.name(module)} ({type(module).__name__}) {why}")

    return refuse


def _dropped_alike(block: Block, module: Any, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Dropout with one mask for all copies, the one that a single copy would have."""
    if block.is_of_one_copy:
        return forward(input)
    copies = block.copies
    if len(input) % copies:
        raise BatchedProbeError(
            f"{block.name(module)} ({type(module).__name__}) takes a tensor of shape {tuple(input.shape)}, "
            f"which has no {copies} copies along its first dimension; set its p to 0"
        )
    first = input[: len(input) // copies]
    inplace, module.inplace = module.inplace, False
    try:
        with torch._C._DisableTorchDispatch():  # unseen by the check of other dropout
            mask = forward(torch.ones_like(first))
    finally:
        module.inplace = inplace
    dropped: Tensor = (input.unflatten(0, (copies, -1)) * mask).flatten(0, 1)
    return dropped
