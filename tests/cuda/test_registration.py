"""A CUDA build registers every operator, and neither needs nor wakes a GPU to do so."""

import os
import subprocess
import sys

import pytest
import torch

from zoext import ops

pytestmark = pytest.mark.skipif(
    ops.cuda_missing is not None, reason=f"the CUDA operators are missing: {ops.cuda_missing}"
)


def operators() -> list[str]:
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zoext::"))


def test_there_are_operators() -> None:
    assert {"zoext::normal_", "zoext::noise_axpy_", "zoext::noise_copy_"} <= set(operators())


@pytest.mark.parametrize("name", operators())
def test_every_operator_has_a_cuda_kernel(name: str) -> None:
    keys = {line.split(":")[0] for line in torch._C._dispatch_dump(name).splitlines()}
    assert {"CPU", "CUDA"} <= keys


def test_import_needs_no_gpu() -> None:
    code = "import torch, zoext.ops as ops; assert not ops.cuda_missing and not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
