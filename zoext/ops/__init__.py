"""Typed functions over ``torch.ops.zoext``, which no other module calls.

All tensors of a call are on one device. ``keys`` holds one parameter key per tensor, ``spans`` one
``(base, run, stride)`` per tensor: local element ``i`` has index
``base + (i // run) * stride + i % run`` in the unsharded parameter.
"""

from __future__ import annotations

from zoext.ops._activations import factored_linear_, power_iteration
from zoext.ops._arguments import Distribution, Rounding, Rule, Span, Stream, span_of
from zoext.ops._dense import noise_axpy_, noise_copies_, noise_copy_, noise_window_, normal_
from zoext.ops._factored import factored_axpy_, factored_copy_, factored_window_
from zoext.ops._library import cuda_missing, rounds

__all__ = [
    "Distribution",
    "Rounding",
    "Rule",
    "Span",
    "Stream",
    "cuda_missing",
    "factored_axpy_",
    "factored_copy_",
    "factored_linear_",
    "factored_window_",
    "noise_axpy_",
    "noise_copies_",
    "noise_copy_",
    "noise_window_",
    "normal_",
    "power_iteration",
    "rounds",
    "span_of",
]
