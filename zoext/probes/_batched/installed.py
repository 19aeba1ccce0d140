"""Replaces the forwards of the modules that own weights, and of dropout, while a closure runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoext.probes._batched.block import Block, Own
from zoext.probes._batched.errors import BatchedProbeError

_MIXES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPS_OTHERWISE = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


class _Forward:
    """The forward of one module while it is replaced; copies of the module would run the original's."""

    def __init__(self, run: Callable[..., Any], name: Callable[[], str]) -> None:
        self._run = run
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise BatchedProbeError(f"the closure copies {self._name()}, and a copy would not be displaced")

    def __reduce__(self) -> NoReturn:
        raise BatchedProbeError(f"the closure pickles {self._name()}, and a copy would not be displaced")


@contextmanager
def installed(
    root: nn.Module, modules: Iterable[nn.Module], owned: dict[nn.Module, list[Own]], block: Block
) -> Iterator[None]:
    """The block in which ``block`` runs the modules of ``root`` that own weights that move."""
    own_forwards: dict[nn.Module, Any] = {}
    handle: RemovableHandle | None = None
    try:
        handle = root.register_forward_pre_hook(
            lambda module, args, kwargs: block.begin_root(args, kwargs), with_kwargs=True, prepend=True
        )
        for module in modules:
            run = _replacement(module, owned, block)
            if run is not None:
                own_forwards[module] = module.__dict__.get("forward")
                module.__dict__["forward"] = _Forward(run, partial(block.name, module))
        yield
    finally:
        for module, forward in own_forwards.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
        if handle is not None:
            handle.remove()


def _replacement(
    module: nn.Module, owned: dict[nn.Module, list[Own]], block: Block
) -> Callable[..., Any] | None:
    forward = module.forward
    if module.training:
        if isinstance(module, _MIXES):
            return _refusing(block, module, "normalizes over all copies in training; call its eval()")
        if isinstance(module, _DROPS) and module.p > 0:
            return partial(_dropped_alike, block.copies, module, forward)
        if isinstance(module, _DROPS_OTHERWISE):
            return _refusing(block, module, "draws other random numbers for each copy; call its eval()")
    if module in owned:
        own = owned[module]
        return lambda *args, **kwargs: block.run(module, own, forward, args, kwargs)
    return None


def _refusing(block: Block, module: nn.Module, why: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise BatchedProbeError(f"{block.name(module)} ({type(module).__name__}) {why}")

    return refuse


def _dropped_alike(copies: int, module: Any, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Dropout with one mask for all copies, the one that a single copy would have."""
    if len(input) % copies:
        raise BatchedProbeError(
            f"{type(module).__name__} takes a tensor of shape {tuple(input.shape)}, which has no {copies} "
            "copies along its first dimension"
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
