"""The shared objects: importing this module registers the operators and their kernels."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from zoext import _C as _C  # registers the schemas and the CPU kernels


def _load_cuda() -> str | None:
    """Registers the CUDA kernels; returns why they are missing, or None if they are there."""
    candidates = [Path(__file__).parents[1] / f"_cuda{suffix}" for suffix in EXTENSION_SUFFIXES]
    library = next((path for path in candidates if path.exists()), None)
    if library is None:
        return "not built"
    if torch.version.cuda is None:
        return f"built, but torch {torch.__version__} is a CPU build"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"built, but cannot be loaded: {error}"
    return None


#: Why there are no CUDA kernels, or None if there are.
cuda_missing = _load_cuda()

_ROUNDED = frozenset(getattr(torch, name) for name in _C.rounded_dtypes())


def rounds(dtype: torch.dtype) -> bool:
    """Whether weights of ``dtype`` hold less than the arithmetic they are moved in (float32).

    Only moves of such weights are rounded in one of the ways of ``Rounding``, and only these have residuals.
    """
    return dtype in _ROUNDED
