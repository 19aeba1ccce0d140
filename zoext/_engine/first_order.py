"""Callers that take the optimizer for one that uses gradients: they are served where that is right."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_WITHOUT_GRAPH = "does not require grad and does not have a grad_fn"


class BackwardInClosureError(RuntimeError):
    """A closure called ``backward()``, for which there is no graph."""


def nothing_to_apply(groups: Sequence[Mapping[str, Any]]) -> RuntimeError:
    """The error of a ``step()`` that no estimate precedes."""
    has_gradients = any(parameter.grad is not None for group in groups for parameter in group["params"])
    gradients = (
        ". Gradients are not used: replace backward() and step() by step(lambda: loss_of(model, batch))"
    )
    return RuntimeError(
        "step() has nothing to apply: call estimate(closure) first, or step(closure)"
        + gradients * has_gradients
    )


def check_not_scaled(optimizer: Any) -> None:
    """Raises a RuntimeError if ``torch.amp.GradScaler.step`` called."""
    if getattr(optimizer, "grad_scale", None) is None:
        return
    del optimizer.grad_scale, optimizer.found_inf  # GradScaler would leave them after an error
    raise RuntimeError(
        "GradScaler.step: a forward-only optimizer has no gradients that could underflow and be scaled; call "
        "optimizer.step(closure), with a model in bfloat16 or with weights in float16 (Accelerate: "
        "mixed_precision='bf16' or 'no'; transformers' Trainer: bf16=True, not fp16=True)"
    )


@contextmanager
def explained_backward() -> Iterator[None]:
    """Names the remedy if a closure that runs within the block calls ``backward()`` or ``autograd.grad``."""
    try:
        yield
    except RuntimeError as error:
        functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if _WITHOUT_GRAPH not in str(error) or not functions & {"backward", "grad"}:
            raise
        if "backward" not in functions:
            raise RuntimeError(
                "closure calls torch.autograd.grad, but it runs with gradients disabled, so there is no "
                "graph. Compute what it differentiates within torch.enable_grad()"
            ) from error
        raise BackwardInClosureError(
            "closure computes gradients, but it runs with gradients disabled, so there is no graph. Delete "
            "its backward() line (loss.backward(), or accelerator.backward(loss)) and return the loss"
        ) from error
