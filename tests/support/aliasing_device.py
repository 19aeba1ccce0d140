"""A device that torch lets one register, ``aliasing``: see ``tests/csrc/aliasing_device.cpp``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "aliasing"
SOURCE = Path(__file__).absolute().parents[1] / "csrc" / "aliasing_device.cpp"


def build(folder: Path) -> Path:
    """Compiles the device. Takes half a minute."""
    standard = "-std=c++20" if torch.__version__ >= "2.12" else "-std=c++17"
    cpp_extension.load(
        name="aliasing_device",
        sources=[str(SOURCE)],
        build_directory=str(folder),
        is_python_module=False,
        extra_cflags=["-O0", "-DAT_PER_OPERATOR_HEADERS", standard],
    )
    return folder / "aliasing_device.so"


def register(library: Path) -> torch.device:
    """Makes the device known to this process, for good."""
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )
    torch._register_device_module(NAME, module)
    sys.modules[f"torch.{NAME}"] = module
    return torch.device(NAME, 0)


def begin_counting(has_float64: bool = False) -> None:
    torch.ops.aliasing_device.begin_counting(has_float64)


def largest_allocation() -> int:
    """In bytes, since counting began."""
    return int(torch.ops.aliasing_device.largest_allocation())


def reads_by_host() -> int:
    """How often the host waited for a value, since counting began."""
    return int(torch.ops.aliasing_device.reads_by_host())
