"""On which device a run is."""

from __future__ import annotations

import torch

from zoext import ops
from zoext.cli.errors import UserError


def choose(name: str | None) -> torch.device:
    """The device called ``name``; by default a GPU where there is one that zoext has kernels for."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and ops.cuda_missing is None else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; give cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {name}: zoext has kernels for cpu and cuda only")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no CUDA device; give --device cpu")
    if ops.cuda_missing is not None:
        raise UserError(
            f"--device {name}: zoext's CUDA kernels: {ops.cuda_missing}; build them or give --device cpu"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices")
    return device
