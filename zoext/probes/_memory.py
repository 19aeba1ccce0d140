"""Where tensors of any kind have their values."""

from __future__ import annotations

import torch
from torch import Tensor


def storage_of(tensor: Tensor) -> int:
    """The address of its storage; 0 for tensors that have none, such as packed, sparse and offloaded ones."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper of other tensors
        return 0
