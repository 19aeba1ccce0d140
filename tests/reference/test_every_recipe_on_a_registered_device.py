"""Optimizers work on a device that zoext has no kernels for, without float64 and without waiting for it.

The device is registered as torch lets one (PrivateUse1), in a process of its own:
``support/aliasing_device.py``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from support import aliasing_device, environment
from support.runs_on_a_device import PRECISIONS, PROBES, SPLITS

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``support/runs_on_a_device.py`` saw."""
    if not shutil.which("c++"):
        pytest.skip("the device is compiled by a C++ compiler, and there is none")
    library = aliasing_device.build(tmp_path_factory.mktemp("device"))
    command = [sys.executable, "-m", "support.runs_on_a_device", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("probe", "recipe"), [(probe, recipe) for probe, recipes in PROBES.items() for recipe in recipes]
)
def test_steps_are_those_of_the_cpu(seen: dict[str, Any], probe: str, recipe: str, precision: str) -> None:
    """To float32 rounding; in 16 bits to two units in the last place of the weights, which are below 4."""
    run = seen["runs"][f"{recipe}/{precision}/{probe}"]
    dtype = PRECISIONS[precision]
    assert run["error"] <= (2e-6 if dtype == torch.float32 else 2 * 2 * torch.finfo(dtype).eps)
    assert run["moved"] > 1e-4
    assert run["reads"] == 0, "the host waited for the device"


@pytest.mark.parametrize("run", SPLITS)
def test_a_model_on_two_devices(seen: dict[str, Any], run: tuple[str, str, str]) -> None:
    """Given equal losses, steps are those of the CPU, to the rounding above."""
    dtype = PRECISIONS[run[1]]
    bound = 2e-6 if dtype == torch.float32 else 2 * 2 * torch.finfo(dtype).eps
    assert seen["splits"]["/".join(run)] <= bound


def test_a_replay_on_the_device_leaves_the_bits_of_the_run(seen: dict[str, Any]) -> None:
    assert all(seen["replays"].values()), seen["replays"]


def test_closures_of_every_kind(seen: dict[str, Any]) -> None:
    assert seen["closures"] == {"raised a step later": True, "finite": True}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_allocation_is_proportional_to_a_parameter(seen: dict[str, Any], precision: str) -> None:
    """The parameter takes 4 MiB in 16 bits; a chunk of 2**18 elements takes 2 MiB in int64."""
    assert seen["allocations"][precision] <= 2 * MEBIBYTE
