"""A report describes the machine of its figures, including what torch and the driver report about the GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoext._benchmarking.machine import environment
from zoext._benchmarking.report import Report

CUDA = torch.device("cuda", 0)
PROPERTIES = {
    "name": "A GPU",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 80 * 2**30,
    "L2_cache_size": 50 * 2**20,
    "uuid": "0123-abcd",
}
CLOCKS = {"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}  # kHz and bits, those of an H100


def describe(monkeypatch: pytest.MonkeyPatch, path: Path, **properties: Any) -> dict[str, Any]:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setenv("PATH", str(path))
    return environment(CUDA)


def driver_tool(folder: Path, *lines: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    tool.chmod(0o755)


def test_the_gpu_is_described_by_torch_and_its_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver_tool(tmp_path, '[ "$1" = --id=GPU-0123-abcd ] || exit 6', 'echo "580.1, 1755, 1980, [N/A]"')
    facts = describe(monkeypatch, tmp_path, **PROPERTIES, **CLOCKS)
    assert (facts["GPU"], facts["compute capability"], facts["multiprocessors"]) == ("A GPU", "9.0", 132)
    assert (facts["memory GiB"], facts["L2 cache MiB"]) == (80, 50)
    assert facts["memory bandwidth GB/s, from its clock and width"] == 3352
    assert (facts["driver"], facts["clock MHz"], facts["highest clock MHz"]) == ("580.1", "1755", "1980")
    assert "power limit W" not in facts  # not reported by the driver


@pytest.mark.parametrize("tool", [None, "exit 9"])
def test_what_nobody_knows_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tool: str | None
) -> None:
    if tool:
        driver_tool(tmp_path, tool)
    facts = describe(monkeypatch, tmp_path, **PROPERTIES)  # older versions of torch do not report clocks
    assert facts["GPU"] == "A GPU"
    assert not {"driver", "clock MHz", "memory bandwidth GB/s, from its clock and width"} & facts.keys()


def test_a_report_describes_the_gpu_it_is_about_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    describe(monkeypatch, tmp_path, **PROPERTIES)
    assert "GPU A GPU" in str(Report("a title", {"device": "cuda:0"}))
    assert "A GPU" not in str(Report("a title", {"device": "cpu"}))
    assert "A GPU" not in str(Report("a title", {}))
