"""Describes the machine and the software that a benchmark's figures depend on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from zoext import _C

#: Queries of the driver's tool, and their names in reports.
_DRIVER_FACTS = {
    "driver_version": "driver",
    "clocks.sm": "clock MHz",
    "clocks.max.sm": "highest clock MHz",
    "power.limit": "power limit W",
}


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Plain data by name, including the GPU if ``device`` is one."""
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instruction set": _C.instruction_set(),
        "compiler": _C.compiler(),
    }
    return facts | (gpu(device) if device is not None and device.type == "cuda" else {})


def gpu(device: torch.device) -> dict[str, Any]:
    """What torch and the driver report about a GPU; unknown facts are omitted."""
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "L2 cache MiB": round(properties.L2_cache_size / 2**20, 1),
        "memory bandwidth GB/s, from its clock and width": _bandwidth(properties),
        "CUDA of torch": torch.version.cuda,
    }
    return {name: value for name, value in facts.items() if value} | _of_the_driver(str(properties.uuid))


def _bandwidth(properties: Any) -> int | None:
    """For double data rate, which all GPU memory has; None in torch versions that do not report the clock."""
    kilohertz, bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return round(2 * kilohertz * 1e3 * bits / 8 / 1e9) or None


def _of_the_driver(uuid: str) -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [f"--id=GPU-{uuid}", f"--query-gpu={','.join(_DRIVER_FACTS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([tool, *query], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = (value.strip() for value in done.stdout.split(","))
    return {
        name: value for name, value in zip(_DRIVER_FACTS.values(), values, strict=False) if value[:1] != "["
    }


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
