"""What the tests of CUDA kernels share: weights, comparisons and the device's counters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from zoext import ops
from zoext.ops import Rounding, Span

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

#: The roundings of copies: only what moves weights where they lie has residuals.
COPY_ROUNDINGS = (Rounding.NEAREST, Rounding.STOCHASTIC)

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
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[cpu.element_size()]
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


def residuals_of(theta: Sequence[Tensor], rounding: Rounding) -> list[Tensor]:
    """Random lower parts of the weights, or none where there are none. As rounding leaves them: below zero
    beside no zero, and zero beside what is not finite."""
    if rounding != Rounding.RESIDUAL:
        return []
    generator = torch.Generator().manual_seed(5)
    residuals = []
    for weight in theta:
        count = weight.numel() if weight.element_size() == 2 else 0
        residual = torch.randint(-128, 128, (count,), generator=generator).to(torch.int8)
        beside = weight.flatten()[:count]
        residual = torch.where(beside == 0, residual.clamp(min=0), residual)
        residuals.append(torch.where(beside.isfinite(), residual, 0))
    return residuals


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


def assert_same_move(
    operator: Callable[..., None],
    theta: Tensor,
    arguments: Sequence[Any],
    place: tuple[Sequence[int], Sequence[Span]],
    **options: Any,
) -> None:
    """``operator([theta], *arguments, *place, **options)`` gives the CPU's bits on CUDA, with all tensors at
    addresses that are aligned and with theta, residuals and factors at such that are not."""
    residuals = residuals_of([theta], options.get("rounding", Rounding.NEAREST))
    with_residuals = {"residuals": residuals} if residuals else {}
    on_device = [
        [Moved(theta.cuda(), device(*residuals)), listed_on_device(arguments, torch.Tensor.cuda)],
        [
            Moved(unaligned(theta), [unaligned(each) for each in residuals]),
            listed_on_device(arguments, unaligned),
        ],
    ]
    theta = theta.clone()
    operator([theta], *arguments, *place, **options, **with_residuals)
    for moved, given in on_device:
        with_residuals = {"residuals": moved.residuals} if residuals else {}
        operator([moved.theta], *given, *place, **options, **with_residuals)
        assert same_bits(moved.theta, theta)
        assert all(same_bits(gpu, cpu) for gpu, cpu in zip(moved.residuals, residuals, strict=True))
    assert all(surroundings_are_untouched(view) for view in (moved.theta, *moved.residuals))


class Moved(NamedTuple):
    theta: Tensor
    residuals: list[Tensor]


def listed_on_device(arguments: Sequence[Any], move: Callable[[Tensor], Tensor]) -> list[Any]:
    """Copies on the device; those of lists, which are factors, by ``move``."""
    return [
        [move(tensor.flatten()).view(tensor.shape) for tensor in argument]
        if isinstance(argument, list)
        else argument.cuda()
        for argument in arguments
    ]
