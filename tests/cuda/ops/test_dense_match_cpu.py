"""The CUDA kernels give the bits of the CPU kernels: no copy, no synchronisation, one launch a list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.cuda_comparison import (
    COPY_ROUNDINGS,
    DTYPES,
    MARKS,
    SPANS,
    assert_same_move,
    device,
    fakegpu,
    launches,
    list_of_tensors,
    nothing_waits,
    residuals_of,
    same_bits,
    surroundings_are_untouched,
    unaligned,
    weights,
)
from zoext import ops
from zoext.ops import Distribution, Rounding, Span

pytestmark = MARKS

BOTH = tuple(Distribution)


def seeds_and_coefficients(terms: int) -> tuple[Tensor, Tensor]:
    seeds = torch.tensor([12345, -(2**63) + 9, 2**62 + 77, 4, -1])
    return seeds[:terms], torch.tensor([1.5e-3, -2.25, 3.0, 0.0, 0.75])[:terms]


@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("seed", "key", "stream"), [(0, 0, 0), (-7, 2**32 - 1, 2), (2**63 - 1, 5, 2**32 - 1)]
)
def test_normal(dtype: torch.dtype, distribution: Distribution, seed: int, key: int, stream: int) -> None:
    expected = torch.empty(20_011, dtype=dtype)
    span = (16, 20_011, 0)
    ops.normal_([expected], torch.tensor([seed]), [key], [span], stream=stream, distribution=distribution)
    out = torch.empty(20_011, dtype=dtype, device="cuda")
    ops.normal_(
        [out], torch.tensor([seed], device="cuda"), [key], [span], stream=stream, distribution=distribution
    )
    assert same_bits(out, expected)


@pytest.mark.parametrize("decay", [0.0, 0.013])
@pytest.mark.parametrize("terms", [0, 1, 3, 5])
@pytest.mark.parametrize("rounding", tuple(Rounding))
@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, terms: int, decay: float
) -> None:
    theta, place = weights(4099, dtype), ([9], [(2**34 + 8, 4099, 0)])
    arguments = (*seeds_and_coefficients(terms), torch.tensor(decay))
    assert_same_move(ops.noise_axpy_, theta, arguments, place, distribution=distribution, rounding=rounding)


#: Three steps, of which the second leaves its first term out, and the third all.
STEPS = torch.tensor([[1.5e-3, -2.25], [0.0, 0.75], [0.0, -0.0]])


@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("rounding", tuple(Rounding))
@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_steps(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, steps: int, terms: int
) -> None:
    """In one launch what they are one after the other."""
    seeds = torch.tensor([[12345, -(2**63) + 9], [2**62 + 77, 4], [-1, 7]])[:steps, :terms].contiguous()
    coefficients, decay = STEPS[:steps, :terms].contiguous(), torch.tensor([0.013, 0.0, 0.25])[:steps]
    theta, place = weights(2051, dtype), ([9], [(2**34 + 8, 2051, 0)])
    options = {"distribution": distribution, "rounding": rounding}
    assert_same_move(ops.noise_axpy_, theta, (seeds, coefficients, decay), place, **options)
    residuals = device(*residuals_of([theta], rounding))
    together, apart = theta.cuda(), theta.cuda()
    kept = [tensor.clone() for tensor in residuals]
    with launches(1 if steps else 0):
        ops.noise_axpy_(
            [together], *device(seeds, coefficients, decay), *place, residuals=residuals, **options
        )
    for step in zip(seeds, coefficients, decay, strict=True):
        ops.noise_axpy_([apart], *device(*step), *place, residuals=kept, **options)
    assert same_bits(together, apart.cpu())
    assert all(same_bits(one, other.cpu()) for one, other in zip(residuals, kept, strict=True))


@pytest.mark.parametrize("terms", [0, 1, 3])
@pytest.mark.parametrize("rounding", COPY_ROUNDINGS)
@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy(dtype: torch.dtype, distribution: Distribution, rounding: Rounding, terms: int) -> None:
    theta, span = weights(2055, dtype), (24, 2055, 0)
    expected = torch.full_like(theta, float("nan"))
    arguments = seeds_and_coefficients(terms)
    ops.noise_copy_(
        [expected], [theta], *arguments, [2], [span], distribution=distribution, rounding=rounding
    )
    source, out, shifted = theta.cuda(), torch.full_like(theta, float("nan")).cuda(), unaligned(theta)
    for to in (out, shifted):
        ops.noise_copy_(
            [to], [source], *device(*arguments), [2], [span], distribution=distribution, rounding=rounding
        )
        assert same_bits(to, expected)
    assert same_bits(source, theta)
    assert surroundings_are_untouched(shifted)


@pytest.mark.parametrize(("count", "span"), SPANS)
@pytest.mark.parametrize("rounding", [Rounding.STOCHASTIC, Rounding.RESIDUAL])
@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spans(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, count: int, span: Span
) -> None:
    theta, options = weights(count, dtype), {"distribution": distribution, "rounding": rounding}
    seeds, coefficients = seeds_and_coefficients(3)
    one = (seeds, coefficients, torch.tensor(0.25))
    three = (seeds[:, None].contiguous(), coefficients[:, None].contiguous(), torch.tensor([0.25, 0.0, 0.1]))
    for arguments in (one, three):
        assert_same_move(ops.noise_axpy_, theta, arguments, ([1], [span]), **options)


@pytest.mark.parametrize("rounding", tuple(Rounding))
@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_of_zero_move_no_bit(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding
) -> None:
    before = weights(1000, dtype)
    theta, place = before.cuda(), ([1], [(0, 1000, 0)])
    residuals = residuals_of([before], rounding)
    kept, options = device(*residuals), {"distribution": distribution, "rounding": rounding}
    seeds, nothing = torch.tensor([5, 6]), torch.tensor([0.0, -0.0])
    for arguments in (
        (seeds, nothing, torch.tensor(0.0)),
        (seeds[:, None], nothing[:, None], torch.zeros(2)),
    ):
        arguments = device(*arguments)
        ops.noise_axpy_([theta], *arguments, *place, residuals=kept, **options)
        assert same_bits(theta, before)
        assert all(same_bits(gpu, cpu) for gpu, cpu in zip(kept, residuals, strict=True))


@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), DTYPES])
def test_lists_with_empty_and_unaligned_tensors(
    dtypes: tuple[torch.dtype, ...], distribution: Distribution
) -> None:
    theta = list_of_tensors([0, 1, 8192, 0, 8193, 3, 16_391, 255, 64, 0, 5000, 12, 0], dtypes)
    keys = [7 * t + 1 for t in range(len(theta))]
    spans = [(3 * t, max(tensor.numel(), 1), 0) for t, tensor in enumerate(theta)]
    on_device = [unaligned(tensor) if t % 3 == 2 else tensor.cuda() for t, tensor in enumerate(theta)]
    arguments = (*seeds_and_coefficients(3), torch.tensor(1e-2))
    ops.noise_axpy_(theta, *arguments, keys, spans, distribution=distribution)
    arguments_on_device = device(*arguments)
    with nothing_waits(), launches(len(dtypes)):
        ops.noise_axpy_(on_device, *arguments_on_device, keys, spans, distribution=distribution)
    assert all(same_bits(gpu, cpu) for gpu, cpu in zip(on_device, theta, strict=True))
    assert all(surroundings_are_untouched(view) for view in on_device[2::3])


def test_thousands_of_tensors() -> None:
    theta = list_of_tensors([t % 13 for t in range(1300)], (torch.float32,))
    keys, spans = list(range(1300)), [ops.span_of(tensor) for tensor in theta]
    on_device = device(*theta)
    arguments = (*seeds_and_coefficients(1), torch.tensor(0.0))
    ops.noise_axpy_(theta, *arguments, keys, spans)
    arguments_on_device = device(*arguments)
    with nothing_waits(), launches(4):  # of 384 tensors at most; 1200 are not empty
        ops.noise_axpy_(on_device, *arguments_on_device, keys, spans)
    assert all(same_bits(gpu, cpu) for gpu, cpu in zip(on_device, theta, strict=True))


@pytest.mark.parametrize("tensors", [[], [0], [0, 0]])
def test_nothing_to_do(tensors: list[int]) -> None:
    theta = [torch.empty(size, device="cuda") for size in tensors]
    arguments = device(*seeds_and_coefficients(1), torch.tensor(0.5))
    ops.noise_axpy_(theta, *arguments, list(range(len(theta))), [(0, 1, 0)] * len(theta))


def test_no_operator_waits_or_allocates() -> None:
    theta, out = torch.ones(5000, device="cuda"), torch.empty(5000, device="cuda")
    seeds, coefficients, decay = device(*seeds_and_coefficients(3), torch.tensor(0.1))
    place = ([3], [(0, 5000, 0)])
    with nothing_waits():
        ops.normal_([out], seeds[:1], *place)
        ops.noise_axpy_([theta], seeds, coefficients, decay, *place)
        ops.noise_copy_([out], [theta], seeds, coefficients, *place)


def test_runs_on_the_current_stream() -> None:
    """On another stream the operator would run while this one sleeps, and its result be overwritten."""
    theta = torch.zeros(4096, device="cuda")
    arguments = (*seeds_and_coefficients(1), torch.tensor(0.5))
    on_device = device(*arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        if not fakegpu:  # the emulator compares the streams itself
            torch.cuda._sleep(200_000_000)
        theta.fill_(2.0)
        ops.noise_axpy_([theta], *on_device, [3], [(0, 4096, 0)])
    stream.synchronize()
    expected = torch.full((4096,), 2.0)
    ops.noise_axpy_([expected], *arguments, [3], [(0, 4096, 0)])
    assert same_bits(theta, expected)


@pytest.mark.skipif(fakegpu is not None, reason="the emulator has no CUDA graphs")
def test_a_captured_graph_follows_its_seeds_and_coefficients() -> None:
    theta = torch.ones(4096, device="cuda")
    seeds, coefficients, decay = device(*seeds_and_coefficients(3), torch.tensor(0.0))
    # The device loads a kernel when it first runs, and may not do so during a capture.
    ops.noise_axpy_([torch.ones_like(theta)], seeds, coefficients, decay, [3], [(0, 4096, 0)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.noise_axpy_([theta], seeds, coefficients, decay, [3], [(0, 4096, 0)])
    seeds += 1
    coefficients *= 2
    decay.fill_(0.25)
    graph.replay()
    expected = torch.ones(4096)
    ops.noise_axpy_([expected], seeds.cpu(), coefficients.cpu(), decay.cpu(), [3], [(0, 4096, 0)])
    assert same_bits(theta, expected)


@pytest.mark.skipif(fakegpu is not None, reason="the emulator would take minutes for 2^32 elements")
@pytest.mark.parametrize("distribution", BOTH)
def test_tensors_beyond_32_bits(distribution: Distribution) -> None:
    count = 2**32 + 2**16 + 5
    if torch.cuda.mem_get_info()[0] < 2 * count + 2**30:
        pytest.skip("9 GiB of free device memory are needed")
    out = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    seed = torch.tensor([77])
    ops.normal_([out], seed.cuda(), [3], [(0, count, 0)], distribution=distribution)
    for start in (0, 2**31 - 500, 2**32 - 500, count - 1000):
        expected = torch.empty(1000, dtype=torch.bfloat16)
        ops.normal_([expected], seed, [3], [(start, 1000, 0)], distribution=distribution)
        assert same_bits(out[start : start + 1000], expected)


@pytest.mark.parametrize("operator", ["normal_", "noise_axpy_", "noise_copy_"])
def test_opcheck(operator: str) -> None:
    theta, out = torch.ones(130, device="cuda"), torch.empty(130, device="cuda")
    seeds, coefficients, decay = device(*seeds_and_coefficients(3), torch.tensor(0.1))
    keys, spans = [3], [0, 130, 0]
    arguments = {
        "normal_": ([out], seeds[:1].clone(), keys, spans, 0, 0),
        "noise_axpy_": ([theta], [], seeds, coefficients, decay, keys, spans, 0, 0),
        "noise_copy_": ([out], [theta], seeds, coefficients, keys, spans, 1, 1),
    }
    torch.library.opcheck(getattr(torch.ops.zoext, operator).default, arguments[operator])


def test_seeds_elsewhere_are_refused() -> None:
    theta = torch.ones(10, device="cuda")
    seeds, coefficients = seeds_and_coefficients(1)
    with pytest.raises(RuntimeError, match="seeds and coefficients must be on the device of the parameters"):
        ops.noise_axpy_([theta], seeds, coefficients.cuda(), torch.tensor(0.0).cuda(), [0], [(0, 10, 0)])
    with pytest.raises(RuntimeError, match="decay must be on the device of the parameters"):
        ops.noise_axpy_([theta], seeds.cuda(), coefficients.cuda(), torch.tensor(0.0), [0], [(0, 10, 0)])
    assert same_bits(theta, torch.ones(10))
