"""Fingerprints of weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_PIECE = 2**26  # bytes that are copied from a device at a time


@torch.no_grad()
def digest(tensor: Tensor) -> str:
    """A hash of the dtype, the shape and the bits of a tensor: 32 hexadecimal digits.

    Empty for one of which there are no plain bits to read: on the meta device, sparse, quantized, or of a
    class of its own.
    """
    if not _has_plain_bits(tensor):
        return ""
    sha256 = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for piece in flat.split(_PIECE):
        sha256.update(piece.cpu().numpy().data)
    return sha256.hexdigest()[:32]


def _has_plain_bits(tensor: Tensor) -> bool:
    is_plain = type(tensor.detach()) is Tensor and tensor.layout == torch.strided
    return is_plain and not (tensor.is_meta or tensor.is_quantized)
