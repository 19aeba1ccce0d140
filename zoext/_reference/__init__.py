"""The operators in plain torch operators, for devices that have no kernels of their own.

They are registered for the dispatch keys below. CPU and CUDA keep their kernels: on CUDA without them the
operators raise, since the bits of this backend differ and it is many times slower there. It uses the same
random words as the kernels and computes the same results up to float32 rounding.
"""

from __future__ import annotations

import torch

from zoext._reference.dense import noise_axpy_, noise_copies_, noise_copy_, noise_window_, normal_
from zoext._reference.factored import factored_axpy_, factored_copy_, factored_window_
from zoext._reference.factored_linear import factored_linear_
from zoext._reference.power_iteration import power_iteration

#: Apple's GPUs, Intel's GPUs, Gaudi, MTIA, and devices of other packages, such as Ascend's NPU.
DISPATCH_KEYS = ("MPS", "XPU", "HPU", "MTIA", "PrivateUse1")

OPERATORS = (
    normal_,
    noise_axpy_,
    noise_copy_,
    noise_copies_,
    noise_window_,
    factored_axpy_,
    factored_copy_,
    factored_window_,
    factored_linear_,
    power_iteration,
)

# Registrations last as long as this object.
_LIBRARY = torch.library.Library("zoext", "IMPL")
for _key in DISPATCH_KEYS:
    for _operator in OPERATORS:
        _LIBRARY.impl(_operator.__name__, _operator, _key)
