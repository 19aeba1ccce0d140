"""The CUDA kernels of Adam steps and of factored directions give the bits of the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from zoext.ops import Distribution, Rounding, Rule, Span

pytestmark = MARKS

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_distribution = pytest.mark.parametrize("distribution", Distribution)
every_rounding = pytest.mark.parametrize("rounding", Rounding)
SEEDS = torch.tensor([[3, -(2**63) + 9, 5], [2**62 + 5, -1, 6], [12, 99, 7], [12345, 4, 2**33 + 1]])
# A step of no estimate at all, and steps of which a term is left out.
COEFFICIENTS = torch.tensor([[0.3, -0.02, 1.0], [0.0, -0.0, 0.0], [1e-7, 0.0, -3.0], [-1.25, 2.0, 5e-4]])


class Adam(NamedTuple):
    """A window and its step, in the order in which operators take them."""

    seeds: Tensor
    coefficients: Tensor
    first_weights: Tensor
    second_weights: Tensor
    lr: Tensor
    eps: Tensor
    decay: Tensor


def adam(steps: int, terms: int, lr: float = 0.03, eps: float = 1e-4, decay: float = 0.01) -> Adam:
    """The newest steps of the window above, with the first terms of each."""
    rows = slice(len(SEEDS) - steps, len(SEEDS))
    return Adam(
        SEEDS[rows, :terms].contiguous(),
        COEFFICIENTS[rows, :terms].contiguous(),
        torch.tensor([0.07, 0.1, 0.15, 0.2])[rows],
        torch.tensor([0.06, 0.07, 0.08, 0.3])[rows],
        torch.tensor(lr),
        torch.tensor(eps),
        torch.tensor(decay),
    )


class Combination(NamedTuple):
    seeds: Tensor
    coefficients: Tensor
    decay: Tensor


def combination(terms: int, decay: float = 0.01) -> Combination:
    seeds, coefficients = SEEDS.flatten()[:terms], COEFFICIENTS.flatten()[:terms]
    return Combination(seeds, coefficients, torch.tensor(decay))


def assert_same_step(theta: Tensor, step: Adam, span: Span, **options: Any) -> None:
    """``noise_window_`` on the CPU and on CUDA, at an address that is aligned and at one that is not."""
    assert_same_move(ops.noise_window_, theta, step, ([9], [span]), **options)


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("steps", [1, 4])
@every_rounding
@every_distribution
@every_dtype
def test_noise_window(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, steps: int, terms: int
) -> None:
    theta, span = weights(4099, dtype), (2**34 + 8, 4099, 0)
    assert_same_step(theta, adam(steps, terms), span, distribution=distribution, rounding=rounding)


@pytest.mark.parametrize(("count", "span"), SPANS)
@pytest.mark.parametrize("rounding", [Rounding.STOCHASTIC, Rounding.RESIDUAL])
@every_distribution
@every_dtype
def test_noise_window_in_spans(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, count: int, span: Span
) -> None:
    options = {"distribution": distribution, "rounding": rounding}
    assert_same_step(weights(count, dtype), adam(3, 2, decay=0.0), span, **options)


def several_adams(count: int, steps: int, terms: int) -> Adam:
    """Steps one after the other, each with the window of as many rows above that ends a row later. The second
    does not move by its window, and the third moves backwards."""
    windows = adam(4, terms, eps=1e-4)
    rows = slice(4 - (count + steps - 1), 4)
    generator = torch.Generator().manual_seed(count)
    return Adam(
        windows.seeds[rows].contiguous(),
        windows.coefficients[rows].contiguous(),
        torch.rand(count, steps, generator=generator),
        torch.rand(count, steps, generator=generator),
        torch.tensor([0.03, 0.0, -0.01, 0.02])[:count],
        windows.eps,
        torch.tensor([0.01, 0.013, 0.0, 0.1])[:count],
    )


@pytest.mark.parametrize(("count", "steps", "terms"), [(0, 2, 1), (1, 3, 2), (2, 3, 2), (3, 1, 3), (3, 2, 0)])
@every_rounding
@every_distribution
@every_dtype
def test_several_window_steps(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, count: int, steps: int, terms: int
) -> None:
    """In one launch what they are one after the other."""
    theta, span = weights(1027, dtype), (2**34 + 3, 1027, 0)
    several, options = (
        several_adams(count, steps, terms),
        {"distribution": distribution, "rounding": rounding},
    )
    assert_same_step(theta, several, span, **options)
    residuals = device(*residuals_of([theta], rounding))
    together, apart = theta.cuda(), theta.cuda()
    kept = [tensor.clone() for tensor in residuals]
    place = ([9], [span])
    with launches(1 if count else 0):
        ops.noise_window_([together], *device(*several), *place, residuals=residuals, **options)
    for s in range(count):
        step = Adam(
            several.seeds[s : s + steps],
            several.coefficients[s : s + steps],
            several.first_weights[s],
            several.second_weights[s],
            several.lr[s],
            several.eps,
            several.decay[s],
        )
        ops.noise_window_([apart], *device(*step), *place, residuals=kept, **options)
    assert same_bits(together, apart.cpu())
    assert all(same_bits(one, other.cpu()) for one, other in zip(residuals, kept, strict=True))


@pytest.mark.parametrize("size", [1e-30, 1e-42, 1e19, 3e38, float("inf"), float("nan")])
@every_dtype
def test_noise_window_of_extreme_estimates(dtype: torch.dtype, size: float) -> None:
    """Squares that vanish and that overflow, with and without eps, and 0 / 0."""
    theta = weights(1001, dtype)
    for eps in (0.0, 1e-8):
        step = adam(2, 2, eps=eps)._replace(coefficients=torch.tensor([[size, size], [-size, 1.0]]))
        assert_same_step(theta, step, (0, 1001, 0))


STILL = {
    "no step": adam(0, 1, eps=0.0, decay=0.0),
    "no term": adam(2, 0, eps=0.0, decay=0.0),
    "no learning rate": adam(4, 3, lr=0.0, eps=0.0, decay=0.0),
    "only zeros": adam(2, 3, eps=0.0, decay=0.0)._replace(coefficients=torch.zeros(2, 3)),
}


@pytest.mark.parametrize("case", STILL)
@every_rounding
@every_dtype
def test_windows_that_move_no_bit(dtype: torch.dtype, rounding: Rounding, case: str) -> None:
    """Not even of a -0, though eps is zero and 0 / sqrt(0) no number; decay alone still moves theta."""
    step, before, span = STILL[case], weights(1000, dtype), (0, 1000, 0)
    left, right = factors(25, 40, terms=1, rank=2)
    theta, matrix = device(before, before)
    residuals = residuals_of([before], rounding)
    kept, beside_matrix = device(*residuals), device(*residuals)
    place = ([1], [span])
    ops.noise_window_([theta], *device(*step), *place, rounding=rounding, residuals=kept)
    given = (*listed(left, right), *device(*step))
    ops.factored_window_([matrix], *given, *place, rounding=rounding, residuals=beside_matrix)
    assert same_bits(theta, before)
    assert same_bits(matrix, before)
    for bytes_on_device in (kept, beside_matrix):
        assert all(same_bits(gpu, cpu) for gpu, cpu in zip(bytes_on_device, residuals, strict=True))
    decaying = step._replace(decay=torch.tensor(0.25))
    assert_same_step(before, decaying, span, rounding=rounding)
    assert_same_factored(before, left, right, decaying, span, rounding)


def factors(
    rows: int, columns: int, *, terms: int, rank: int, right_terms: int | None = None
) -> tuple[Tensor, Tensor]:
    """A left and a right factor for each term; with one of ``terms`` or ``right_terms`` 1, shared."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    left = torch.randn(terms, rank, rows, generator=generator)
    right = torch.randn(terms if right_terms is None else right_terms, rank, columns, generator=generator)
    return left, right


def listed(*tensors: Tensor) -> list[list[Tensor]]:
    """Lists of one tensor each, on the device."""
    return [[tensor] for tensor in device(*tensors)]


def assert_same_factored(
    theta: Tensor, left: Tensor, right: Tensor, change: Adam | Combination, span: Span, rounding: Rounding
) -> None:
    """``factored_window_`` or ``factored_axpy_`` on the CPU and on CUDA, everything at addresses that are
    aligned and at such that are not."""
    operator = ops.factored_window_ if isinstance(change, Adam) else ops.factored_axpy_
    assert_same_move(operator, theta, ([left], [right], *change), ([9], [span]), rounding=rounding)


# Rows and columns that fill whole accesses and that do not, and rows that are shorter than one.
SHAPES = [(1, 1), (1, 37), (41, 1), (7, 2), (9, 3), (5, 8), (8, 5), (33, 33), (64, 64), (12, 20), (257, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_rounding
@every_dtype
def test_factored_shapes(dtype: torch.dtype, rounding: Rounding, shape: tuple[int, int]) -> None:
    rows, columns = shape
    theta, span = weights(rows * columns, dtype), (2**34, rows * columns, 0)
    for rank in (1, 2, 5):
        left, right = factors(rows, columns, terms=3, rank=rank)
        assert_same_factored(theta, left, right, combination(3), span, rounding)
    left, right = factors(rows, columns, terms=8, rank=2, right_terms=1)
    assert_same_factored(theta, left, right, adam(4, 2), span, rounding)


@pytest.mark.parametrize("shared", ["neither", "left", "right", "both"])
@pytest.mark.parametrize(("steps", "terms"), [(1, 1), (1, 3), (4, 1), (4, 3)])
@every_rounding
@every_dtype
def test_shared_factors(dtype: torch.dtype, rounding: Rounding, steps: int, terms: int, shared: str) -> None:
    """The term of step h and column k has the factors of number h K + k, or those of all."""
    rows, columns, count = 19, 24, steps * terms
    left, right = factors(
        rows,
        columns,
        terms=1 if shared in ("left", "both") else count,
        right_terms=1 if shared in ("right", "both") else count,
        rank=3,
    )
    theta, span = weights(rows * columns, dtype), (8, rows * columns, 0)
    assert_same_factored(theta, left, right, adam(steps, terms), span, rounding)
    assert_same_factored(theta, left, right, combination(count, decay=0.0), span, rounding)


@pytest.mark.parametrize("shared", ["neither", "both"])
@every_rounding
@every_dtype
def test_several_factored_steps(dtype: torch.dtype, rounding: Rounding, shared: str) -> None:
    """Term k of step s has the factors of number s K + k, and of the row h of a history h K + k."""
    rows, columns = 19, 24
    left, right = factors(rows, columns, terms=1 if shared == "both" else 6, rank=3)
    theta, span = weights(rows * columns, dtype), (8, rows * columns, 0)
    steps = Combination(
        SEEDS[:3, :2].contiguous(), COEFFICIENTS[:3, :2].contiguous(), torch.tensor([0.0, 0.013, 0.25])
    )
    for change in (steps, several_adams(2, 2, 2)):
        assert_same_factored(theta, left, right, change, span, rounding)


# For matrices of 30 x 24. Spans only place the bits of stochastic rounding: whole, from the middle of
# a block of bits on, and blocks of a larger matrix, with runs that are rows and runs that are not.
WHOLE = [(0, 720, 0), (2**34 + 3, 720, 0)]
BLOCKS = [(2**35 + 16, 24, 64), (5, 24, 37), (64, 64, 256), (3, 7, 11)]


@pytest.mark.parametrize("span", WHOLE + BLOCKS, ids=str)
@every_dtype
def test_factored_spans(dtype: torch.dtype, span: Span) -> None:
    theta, (left, right) = weights(720, dtype), factors(30, 24, terms=6, rank=2)
    for change in (combination(6), adam(2, 3), several_adams(2, 2, 2)):
        for rounding in (Rounding.STOCHASTIC, Rounding.RESIDUAL):
            assert_same_factored(theta, left, right, change, span, rounding)


@pytest.mark.parametrize("columns", [32, 33])
@every_dtype
def test_factors_of_every_kind(dtype: torch.dtype, columns: int) -> None:
    """Zeros, whose products keep their signs, products that vanish and overflow, and no numbers; rank 0."""
    theta, span = weights(16 * columns, dtype), (0, 16 * columns, 0)
    left, right = factors(16, columns, terms=3, rank=2)
    special = torch.tensor([0.0, -0.0, 1e-45, 3e-39, -1e38, 3e38, float("inf"), float("nan")])
    left[:, :, :8] = special
    right[:, 1, 4:12] = special
    for change in (combination(3, decay=0.0), adam(1, 3, eps=0.0, decay=0.0)):
        assert_same_factored(theta, left, right, change, span, Rounding.NEAREST)
        assert_same_factored(theta, left[:, :0], right[:, :0], change, span, Rounding.NEAREST)


@pytest.mark.parametrize("rounding", COPY_ROUNDINGS)
@every_dtype
def test_factored_copy(dtype: torch.dtype, rounding: Rounding) -> None:
    for rows, columns in ((31, 24), (9, 13)):
        theta, span = weights(rows * columns, dtype), (16, rows * columns, 0)
        left, right = factors(rows, columns, terms=1, rank=2, right_terms=3)
        seeds, coefficients, _ = combination(3)
        expected = torch.full_like(theta, float("nan"))
        arguments = (seeds, coefficients, [2], [span])
        ops.factored_copy_([expected], [theta], [left], [right], *arguments, rounding=rounding)
        source, out, shifted = theta.cuda(), torch.full_like(expected, float("nan")).cuda(), unaligned(theta)
        on_device = (*listed(left, right), *device(seeds, coefficients), [2], [span])
        for to in (out, shifted):
            ops.factored_copy_([to], [source], *on_device, rounding=rounding)
            assert same_bits(to, expected)
        assert same_bits(source, theta)
        assert surroundings_are_untouched(shifted)


@every_rounding
@every_dtype
def test_coefficients_of_zero_move_no_bit(dtype: torch.dtype, rounding: Rounding) -> None:
    before = weights(1000, dtype)
    theta, nothing = before.cuda(), torch.tensor([0.0, -0.0])
    arguments = (*listed(*factors(25, 40, terms=2, rank=2)), *device(torch.tensor([5, 6]), nothing))
    place, residuals = ([1], [(0, 1000, 0)]), residuals_of([before], rounding)
    kept, decay = device(*residuals), torch.tensor(0.0).cuda()
    ops.factored_axpy_([theta], *arguments, decay, *place, rounding=rounding, residuals=kept)
    assert same_bits(theta, before)
    assert all(same_bits(gpu, cpu) for gpu, cpu in zip(kept, residuals, strict=True))
    if rounding in COPY_ROUNDINGS:
        out = torch.empty_like(theta)
        ops.factored_copy_([out], [theta], *arguments, *place, rounding=rounding)
        assert same_bits(out, before)


def places(theta: Sequence[Tensor]) -> tuple[list[int], list[Span]]:
    spans = [(3 * t, max(tensor.numel(), 1), 0) for t, tensor in enumerate(theta)]
    return [7 * t + 1 for t in range(len(theta))], spans


def assert_same_lists(
    operator: Callable[..., None],
    lists: Sequence[Sequence[Tensor]],
    arguments: Adam | Combination,
    expected_launches: int,
) -> None:
    """An operator on lists of tensors, theta the first of them, that moves theta alike on both devices."""
    theta, on_device = lists[0], [device(*tensors) for tensors in lists]
    on_device[0][2::3] = [unaligned(tensor) for tensor in theta[2::3]]
    arguments_on_device = device(*arguments)
    operator(*lists, *arguments, *places(theta))
    with nothing_waits(), launches(expected_launches):
        operator(*on_device, *arguments_on_device, *places(theta))
    assert all(same_bits(gpu, cpu) for gpu, cpu in zip(on_device[0], theta, strict=True))
    assert all(surroundings_are_untouched(view) for view in on_device[0][2::3])


def matrices(
    shapes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype], terms: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Matrices and their factors, of which every other right one is shared; ranks differ."""
    theta = list_of_tensors([rows * columns for rows, columns in shapes], dtypes)
    pairs = [
        factors(*shape, terms=terms, rank=1 + t % 3, right_terms=1 if t % 2 else terms)
        for t, shape in enumerate(shapes)
    ]
    return theta, [left for left, _ in pairs], [right for _, right in pairs]


SIZES = [0, 1, 8192, 0, 8193, 3, 16_391, 255, 64, 0, 5000, 12, 0]
FEW = [(0, 4), (1, 1), (64, 128), (5, 0), (3, 2731), (3, 1), (37, 443), (51, 5), (0, 0), (50, 100)]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), DTYPES], ids=["one dtype", "all dtypes"])
@every_distribution
def test_lists_for_noise_window(distribution: Distribution, dtypes: tuple[torch.dtype, ...]) -> None:
    def operator(*arguments: Any) -> None:
        ops.noise_window_(*arguments, distribution=distribution)

    assert_same_lists(operator, [list_of_tensors(SIZES, dtypes)], adam(2, 2), len(dtypes))


@pytest.mark.parametrize("dtypes", [(torch.float16,), DTYPES], ids=["one dtype", "all dtypes"])
def test_lists_of_matrices(dtypes: tuple[torch.dtype, ...]) -> None:
    assert_same_lists(ops.factored_axpy_, matrices(FEW, dtypes, 4), combination(4), len(dtypes))
    assert_same_lists(ops.factored_window_, matrices(FEW, dtypes, 4), adam(4, 1), len(dtypes))


@pytest.mark.parametrize("more", [0, 1])
def test_hundreds_of_tensors(more: int) -> None:
    """A launch has room for 384 tensors, or for 202 matrices with their factors; empty ones take none."""
    tensors = list_of_tensors([t % 13 for t in range(416 + 2 * more)], DTYPES[:1])
    assert_same_lists(ops.noise_window_, [tensors], adam(1, 1), 1 + more)
    shapes = [(t % 5, 1 + t % 7) for t in range(253 + 2 * more)]
    for operator, change in ((ops.factored_axpy_, combination(2)), (ops.factored_window_, adam(2, 1))):
        assert_same_lists(operator, matrices(shapes, DTYPES[:1], 2), change, 1 + more)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_nothing_to_do(count: int) -> None:
    theta = [torch.empty(0, device="cuda") for _ in range(count)]
    lefts, rights = ([torch.ones(1, 2, 0, device="cuda")] * count for _ in range(2))
    place = (list(range(count)), [(0, 1, 0)] * count)
    with launches(0):
        ops.noise_window_(theta, *device(*adam(1, 1)), *place)
        ops.factored_window_(theta, lefts, rights, *device(*adam(1, 1)), *place)
        ops.factored_axpy_(theta, lefts, rights, *device(*combination(1)), *place)
        ops.factored_copy_(theta, theta, lefts, rights, *device(*combination(1)[:2]), *place)


def test_no_operator_waits_or_allocates() -> None:
    theta, out = torch.ones(5000, device="cuda"), torch.empty(5000, device="cuda")
    left, right = listed(*factors(50, 100, terms=3, rank=2))
    window, (seeds, coefficients, decay) = device(*adam(1, 3)), device(*combination(3))
    place = ([3], [(0, 5000, 0)])
    with nothing_waits(), launches(4):
        ops.noise_window_([theta], *window, *place)
        ops.factored_axpy_([theta], left, right, seeds, coefficients, decay, *place)
        ops.factored_copy_([out], [theta], left, right, seeds, coefficients, *place)
        ops.factored_window_([theta], left, right, *window, *place)


def test_runs_on_the_current_stream() -> None:
    """On another stream an operator would run while this one sleeps, and its result be overwritten."""
    left, right = factors(64, 64, terms=2, rank=2)
    theta = [torch.zeros(4096, device="cuda") for _ in range(3)]
    lefts, rights = listed(left, right)
    window, change = device(*adam(2, 1)), device(*combination(2))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        if not fakegpu:  # the emulator compares the streams itself
            torch.cuda._sleep(200_000_000)
        for tensor in theta:
            tensor.fill_(2.0)
        ops.noise_window_(theta[:1], *window, [9], [(0, 4096, 0)])
        ops.factored_axpy_(theta[1:2], lefts, rights, *change, [9], [(0, 4096, 0)])
        ops.factored_window_(theta[2:], lefts, rights, *window, [9], [(0, 4096, 0)])
    stream.synchronize()
    expected = [torch.full((4096,), 2.0) for _ in range(3)]
    ops.noise_window_(expected[:1], *adam(2, 1), [9], [(0, 4096, 0)])
    ops.factored_axpy_(expected[1:2], [left], [right], *combination(2), [9], [(0, 4096, 0)])
    ops.factored_window_(expected[2:], [left], [right], *adam(2, 1), [9], [(0, 4096, 0)])
    assert all(same_bits(gpu, cpu) for gpu, cpu in zip(theta, expected, strict=True))


@pytest.mark.skipif(fakegpu is not None, reason="the emulator has no CUDA graphs")
def test_a_captured_graph_follows_its_window() -> None:
    theta, moved = torch.ones(4096, device="cuda"), torch.ones(4096, device="cuda")
    left, right = listed(*factors(64, 64, terms=6, rank=2))
    window = device(*adam(2, 3))
    # The device loads a kernel when it first runs, and may not do so during a capture.
    ops.noise_window_([theta.clone()], *window, [3], [(0, 4096, 0)])
    ops.factored_window_([moved.clone()], left, right, *window, [3], [(0, 4096, 0)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.noise_window_([theta], *window, [3], [(0, 4096, 0)])
        ops.factored_window_([moved], left, right, *window, [3], [(0, 4096, 0)])
    for tensor in window:
        tensor += 1
    left[0] *= 2
    graph.replay()
    expected, window = [torch.ones(4096), torch.ones(4096)], [tensor.cpu() for tensor in window]
    ops.noise_window_(expected[:1], *window, [3], [(0, 4096, 0)])
    ops.factored_window_(expected[1:], [left[0].cpu()], [right[0].cpu()], *window, [3], [(0, 4096, 0)])
    assert same_bits(theta, expected[0])
    assert same_bits(moved, expected[1])


@pytest.mark.skipif(fakegpu is not None, reason="the emulator would take minutes for 2^32 elements")
def test_matrices_beyond_32_bits() -> None:
    rows, columns = 65_537, 65_540
    if torch.cuda.mem_get_info()[0] < 2 * rows * columns + 2**30:
        pytest.skip("9 GiB of free device memory are needed")
    left, right = factors(rows, columns, terms=1, rank=2)
    theta = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    change, span = combination(1), (0, rows * columns, 0)
    ops.factored_axpy_(
        [theta], *listed(left, right), *device(*change), [3], [span], rounding=Rounding.STOCHASTIC
    )
    for row in (0, 32_768, rows - 1):
        expected = torch.ones(columns, dtype=torch.bfloat16)
        part, place = left[:, :, row : row + 1].contiguous(), (row * columns, columns, 0)
        ops.factored_axpy_([expected], [part], [right], *change, [3], [place], rounding=Rounding.STOCHASTIC)
        assert same_bits(theta[row], expected)


@pytest.mark.parametrize(
    "operator", ["noise_window_", "factored_axpy_", "factored_copy_", "factored_window_"]
)
def test_opcheck(operator: str) -> None:
    theta, out = torch.ones(130, device="cuda"), torch.empty(130, device="cuda")
    left, right = listed(*factors(10, 13, terms=3, rank=2))
    window, change = device(*adam(1, 3)), device(*combination(3))
    keys, spans = [3], [0, 130, 0]
    arguments = {
        "noise_window_": ([theta], [], *window, keys, spans, 1, 1, Rule.SIGN),
        "factored_axpy_": ([theta], [], left, right, *change, keys, spans, 0),
        "factored_copy_": ([out], [theta], left, right, *change[:2], keys, spans, 1),
        "factored_window_": ([theta], [], left, right, *window, keys, spans, 0, Rule.SCALAR_ADAM),
    }
    torch.library.opcheck(getattr(torch.ops.zoext, operator).default, arguments[operator])


GOOD_MATRICES: dict[str, Any] = {
    "theta": [torch.full((12,), 7.0), torch.full((4, 2), 7.0)],
    "left": [torch.ones(6, 2, 3), torch.ones(1, 1, 4)],
    "right": [torch.ones(1, 2, 4), torch.ones(6, 1, 2)],
    "keys": [0, 1],
    "spans": [(0, 12, 0), (0, 8, 0)],
}
# What is wrong, and the arguments that make it so.
BAD_WINDOWS: dict[str, dict[str, Any]] = {
    "seeds of one dimension": {"seeds": torch.ones(6).long()},
    "float seeds": {"seeds": torch.ones(2, 3)},
    "coefficients of another shape": {"coefficients": torch.ones(3, 2)},
    "double coefficients": {"coefficients": torch.ones(2, 3).double()},
    "too many weights": {"first_weights": torch.ones(3)},
    "double weights": {"second_weights": torch.ones(2).double()},
    "two learning rates": {"lr": torch.ones(2)},
    "double eps": {"eps": torch.ones(()).double()},
    "no decay": {"decay": torch.ones(0)},
}
BAD_FACTORS: dict[str, dict[str, Any]] = {
    "one left factor too few": {"left": [torch.ones(6, 2, 3)]},
    "two dimensions": {"right": [torch.ones(1, 2, 4), torch.ones(6, 2)]},
    "double factor": {"left": [torch.ones(6, 2, 3).double(), torch.ones(1, 1, 4)]},
    "strided factor": {"right": [torch.ones(1, 4, 2).mT, torch.ones(6, 1, 2)]},
    "one term too few": {"left": [torch.ones(5, 2, 3), torch.ones(1, 1, 4)]},
    "ranks differ": {"right": [torch.ones(1, 3, 4), torch.ones(6, 1, 2)]},
    "factors of a larger matrix": {"left": [torch.ones(6, 2, 4), torch.ones(1, 1, 4)]},
}
BAD_TENSORS_AND_PLACES: dict[str, dict[str, Any]] = {
    "one key too few": {"keys": [0]},
    "key beyond 32 bits": {"keys": [0, 2**32]},
    "span beyond 63 bits": {"spans": [(0, 12, 0), (2**63 - 4, 8, 0)]},
    "no such rounding": {"rounding": 3},
    "residuals missing": {"rounding": 2},
    "strided theta": {"theta": [torch.full((12,), 7.0), torch.full((2, 4), 7.0).T]},
    "integers": {"theta": [torch.full((12,), 7), torch.full((4, 2), 7)]},
}


def on(where: str, argument: Any) -> Any:
    """A copy of an argument, or of the tensors of a list, with the strides it has."""
    if isinstance(argument, list):
        return [on(where, item) for item in argument]
    return argument.to(where, copy=True) if isinstance(argument, Tensor) else argument


def refusal(operator: Callable[..., None], where: str, arguments: dict[str, Any]) -> str:
    """The message of the error that an operator raises, before it changes anything."""
    arguments = {name: on(where, argument) for name, argument in arguments.items()}
    with pytest.raises(RuntimeError) as error:
        operator(**arguments)
    for tensor in (*arguments["theta"], *arguments.get("out", ())):
        assert (tensor == 7).all()
    return str(error.value).splitlines()[0].partition("arguments.h:")[2]


def assert_same_refusal(operator: Callable[..., None], good: dict[str, Any], bad: dict[str, Any]) -> None:
    arguments = {name: on("cuda", argument) for name, argument in good.items()}
    operator(**arguments)  # or the test would show nothing
    assert refusal(operator, "cuda", good | bad) == refusal(operator, "cpu", good | bad)


@pytest.mark.parametrize("wrong", [*BAD_WINDOWS, *BAD_TENSORS_AND_PLACES, "no such distribution"])
def test_noise_window_refuses_what_the_cpu_refuses(wrong: str) -> None:
    good = {name: GOOD_MATRICES[name] for name in ("theta", "keys", "spans")} | adam(2, 3)._asdict()
    bad = (BAD_WINDOWS | BAD_TENSORS_AND_PLACES).get(wrong, {"distribution": 2})
    assert_same_refusal(ops.noise_window_, good, bad)


@pytest.mark.parametrize("wrong", [*BAD_WINDOWS, *BAD_FACTORS, *BAD_TENSORS_AND_PLACES])
def test_factored_window_refuses_what_the_cpu_refuses(wrong: str) -> None:
    bad = (BAD_WINDOWS | BAD_FACTORS | BAD_TENSORS_AND_PLACES)[wrong]
    assert_same_refusal(ops.factored_window_, GOOD_MATRICES | adam(2, 3)._asdict(), bad)


@pytest.mark.parametrize("wrong", [*BAD_FACTORS, *BAD_TENSORS_AND_PLACES, "seeds of two dimensions"])
def test_factored_combinations_refuse_what_the_cpu_refuses(wrong: str) -> None:
    bad = (BAD_FACTORS | BAD_TENSORS_AND_PLACES).get(wrong, {"seeds": SEEDS[:2]})
    good = GOOD_MATRICES | combination(6)._asdict()
    assert_same_refusal(ops.factored_axpy_, good, bad)
    del good["decay"]
    assert_same_refusal(ops.factored_copy_, good | {"out": GOOD_MATRICES["theta"]}, bad)


def test_arguments_elsewhere_are_refused() -> None:
    theta = torch.ones(12, device="cuda")
    left, right = (tensors[0].cuda() for tensors in (GOOD_MATRICES["left"], GOOD_MATRICES["right"]))
    window, place = adam(2, 3), ([0], [(0, 12, 0)])
    for number, name in enumerate(Adam._fields):
        arguments = device(*window)
        arguments[number] = window[number]
        terms = (
            "seeds and coefficients"
            if name in ("seeds", "coefficients")
            else "seeds, coefficients and weights"
        )
        message = f"{name if name in ('lr', 'eps', 'decay') else terms} must"
        with pytest.raises(RuntimeError, match=f"{message} be on the device of the parameters"):
            ops.noise_window_([theta], *arguments, *place)
        with pytest.raises(RuntimeError, match=f"{message} be on the device of the parameters"):
            ops.factored_window_([theta], [left], [right], *arguments, *place)
    with pytest.raises(RuntimeError, match=r"left\[0\] must be on the device of the parameters"):
        ops.factored_window_([theta], [left.cpu()], [right], *device(*window), *place)
    with pytest.raises(RuntimeError, match=r"right\[0\] must be on the device of the parameters"):
        ops.factored_axpy_([theta], [left], [right.cpu()], *device(*combination(6)), *place)
    assert same_bits(theta, torch.ones(12))
