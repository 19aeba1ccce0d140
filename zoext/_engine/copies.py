"""Closures that take a number of copies of the batch, and return a loss for each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoext._parameters import shards
from zoext._runtime.devices import moved, widest
from zoext.estimators import Round

_COPIES = "copies"


def check_closure(closure: object, *, takes_copies: bool) -> None:
    """Raises a TypeError for a closure that cannot be called, with a number of copies or without any."""
    if not callable(closure):
        raise TypeError(
            f"closure must be a function that evaluates the loss, not {type(closure).__name__}: "
            "step(lambda: loss_of(model, batch))"
        )
    try:
        signature = inspect.signature(closure)
    except (ValueError, TypeError):  # of a function that is not written in Python
        return
    first = next(iter(signature.parameters.values()), None)
    if not takes_copies:
        if not _takes(signature):
            raise TypeError(f"{_shown(signature)}: {_called_without(first)}")
    elif not _takes(signature, 2):
        raise TypeError(
            f"{_shown(signature)}: a batched probe calls closure(copies), which runs the model on "
            "zoext.repeat(batch, copies) and returns a loss for each copy, zoext.mean_per_copy(losses, "
            "copies)"
        )
    elif first is not None and first.default is not first.empty and first.name != _COPIES:
        raise TypeError(
            f"{_shown(signature)}: a batched probe calls closure(copies), and the number of copies would "
            f"replace the default of {first.name!r}; take it first: lambda copies, {first.name}=...: ..."
        )


def _takes(signature: inspect.Signature, *arguments: object) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _shown(signature: inspect.Signature) -> str:
    """The signature without its defaults, which may be large tensors."""
    parameters = signature.parameters.values()
    names = (str(each.replace(default=each.empty, annotation=each.empty)) for each in parameters)
    defaults = ("" if each.default is each.empty else "=..." for each in parameters)
    return f"closure({', '.join(map(''.join, zip(names, defaults, strict=True)))})"


def _called_without(first: inspect.Parameter | None) -> str:
    if first is not None and first.name == _COPIES:
        return (
            "this closure takes copies, and only a batched probe passes their number; pass probe='batched' "
            "to the optimizer, or a closure without arguments"
        )
    return (
        "the closure is called without arguments; pass step(lambda: loss_of(model, batch)), or "
        "probe='batched' to the optimizer if the argument is a number of copies of the batch"
    )


def portions(indices: Sequence[int], largest: int | None) -> Iterator[Sequence[int]]:
    """``indices`` in portions of at most ``largest``."""
    size = largest or max(len(indices), 1)
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def terms_of(pending: Round, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Seeds [K] and coefficients [C, K] of some probes of a round, a row for each."""
    supports = [pending.supports[index] for index in indices if pending.supports[index]]
    if not supports:
        return pending.seeds[:0], pending.coefficients.new_zeros((len(indices), 0))
    first, last = min(each.start for each in supports), max(each.stop for each in supports)
    rows = torch.stack([pending.coefficients[index] for index in indices])
    seeds = pending.seeds if last - first == len(pending.seeds) else pending.seeds[first:last]
    return seeds, rows[:, first:last]


def split(returned: Any, copies: int, device: torch.device) -> tuple[list[Tensor], Any]:
    """The losses of the copies, [] each, and their weight, if the closure returned one."""
    losses, weight = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"closure must return a tensor with a loss for each of {copies} copies, not {losses!r}"
        )
    if losses.is_complex():
        raise TypeError(f"closure must return real numbers, not {losses.dtype}")
    losses = shards.whole(losses.detach())
    if losses.shape != (copies,) and not (copies == 1 and losses.numel() == 1):
        raise ValueError(
            f"closure must return a loss for each of {copies} copies, a tensor of shape ({copies},), not "
            f"{tuple(losses.shape)}; reduce the losses of examples with zoext.mean_per_copy(losses, copies)"
        )
    dtype = widest(device) if losses.dtype == torch.float64 else torch.float32
    return list(moved(losses.reshape(copies).to(dtype), device).unbind()), weight
