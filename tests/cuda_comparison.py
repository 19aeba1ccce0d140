"""What the tests of CUDA kernels share: weights, comparisons and the device's counters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from zoext import ops
from zoext.ops import Span

try:
    import fakegpu  # an emulator: it counts launches, but is slow and has no graphs
except ImportError:
    fakegpu = None

MISSING = "torch sees no CUDA device" if not torch.cuda.is_available() else ops.cuda_missing
#: The marks of a file of such tests.
MARKS = [
    pytest.mark.cuda,
    pytest.mark.skipif(MISSING is not None, reason=f"no CUDA: {MISSING}"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Whole parameters; shards that begin anywhere, also in the middle of a Philox block and beyond 2^34;
# blocks whose rows are aligned, unaligned, or shorter than a Philox block.
SPANS: tuple[tuple[int, Span], ...] = (
    (1, (0, 1, 0)),
    (4099, (0, 4099, 0)),
    (4096, (8, 4096, 0)),
    (2049, (2**34 + 3, 2049, 0)),
    (2049, (2**61 + 128, 5000, 0)),
    (3000, (256, 96, 128)),
    (3000, (2**35 + 7, 100, 333)),
    (257, (2**32 - 40, 3, 5)),
    (100, (6, 1, 1000)),
    (640, (64, 64, 64)),
)


def same_bits(gpu: Tensor, cpu: Tensor) -> bool:
    """Equal to the bit; which of its many NaNs a NaN is, IEEE 754 leaves to the processor."""
    gpu, cpu = gpu.cpu(), cpu.contiguous()
    is_nan = cpu.isnan()
    bits = torch.int16 if cpu.element_size() == 2 else torch.int32 if cpu.element_size() == 4 else torch.int64
    return torch.equal(gpu.isnan(), is_nan) and torch.equal(gpu.view(bits)[~is_nan], cpu.view(bits)[~is_nan])


def weights(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random weights of every magnitude, with zeros, subnormals, the largest numbers and infinities."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-40, 15, (count,), generator=generator)
    theta = torch.ldexp(torch.randn(count, generator=generator, dtype=torch.float64), exponents).to(dtype)
    limits = torch.finfo(dtype)
    special = [0.0, -0.0, float("inf"), -float("inf"), limits.max, -limits.max]
    special += [limits.smallest_normal / 2, -limits.smallest_normal * 1.5, float("nan")]
    if count >= 100:
        theta[20 : 20 + len(special)] = torch.tensor(special, dtype=dtype)
    return theta


def device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


def unaligned(tensor: Tensor) -> Tensor:
    """A copy on the device whose address is not a multiple of 16, between elements that must stay."""
    buffer = torch.full((tensor.numel() + 2,), 7.0, dtype=tensor.dtype, device="cuda")
    view = buffer[1:-1]
    view.copy_(tensor)
    assert tensor.numel() == 0 or view.data_ptr() % 16 != 0
    return view


def surroundings_are_untouched(view: Tensor) -> bool:
    base = view._base
    return base is not None and base[0].item() == 7.0 and base[-1].item() == 7.0


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Fails if an operator makes the host wait or allocates on the device."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before


def list_of_tensors(sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [weights(size, dtypes[t % len(dtypes)], seed=t) for t, size in enumerate(sizes)]


@contextlib.contextmanager
def launches(expected: int) -> Iterator[None]:
    """Fails if another number of kernels is launched; only an emulator counts them."""
    before = fakegpu.counters()["launches"] if fakegpu else 0
    yield
    if fakegpu:
        assert fakegpu.counters()["launches"] - before == expected
