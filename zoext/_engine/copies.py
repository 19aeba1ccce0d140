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


def check_closure(closure: object, *, takes_copies: bool) -> None:
    """Raises a TypeError for a closure that cannot be called, or not with a number of copies if it must."""
    if not callable(closure):
        raise TypeError(
            f"closure must be a function that evaluates the loss, not {type(closure).__name__}: "
            "step(lambda: loss_of(model, batch))"
        )
    if not takes_copies:
        return
    try:
        signature = inspect.signature(closure)
    except ValueError:  # of a function that is not written in Python
        return
    try:
        signature.bind(2)
    except TypeError:
        raise TypeError(
            f"closure{signature}: a batched probe calls closure(copies), which runs the model on "
            "zoext.repeat(batch, copies) and returns a loss for each copy, zoext.mean_per_copy(losses, "
            "copies)"
        ) from None


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
