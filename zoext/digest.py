"""Fingerprints of weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_PIECE = 2**26  # bytes that are copied from a device at a time


@torch.no_grad()
def digest(tensor: Tensor) -> str:
    """A hash of the dtype, the shape and the bits of a tensor: 32 hexadecimal digits."""
    sha256 = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for piece in flat.split(_PIECE):
        sha256.update(piece.cpu().numpy().data)
    return sha256.hexdigest()[:32]
