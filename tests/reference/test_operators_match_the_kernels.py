"""The reference gives what the kernels give, to the rounding that normals within 1e-6 imply.

The same words are drawn, so all that differs is float32 rounding. A weight in 16 bits is equal unless its
value lies next to the border between two numbers: at most one in a thousand is its neighbour. With residuals
the same holds for floats of 24 bits to a few units in their last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from support import oracle
from zoext import _reference
from zoext.ops import Distribution, Rounding, Rule

SIZE = {"cpu": 30_011, "cuda": 1_511}  # no multiple of a block; a simulated device is slow
SIDE = {"cpu": 173, "cuda": 39}
TERMS = 3
COEFFICIENTS = torch.tensor([[0.03, -0.01, 0.0], [1e-3, 0.02, 0.5], [0.0] * 3, [0.01, 0.0, -0.2]])
SEEDS = torch.tensor([[3, -1, 5], [2**62 + 5, -(2**63), 6], [12, 99, 7], [2**63 - 1, 4, 0]])
LOST_ULPS = 4  # of float32, by orders of sums and second roundings

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_rounding = pytest.mark.parametrize("rounding", Rounding)
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], ids=["cpu", "cuda"]
)

Run = Callable[[Any, Tensor, list[Tensor]], None]


@pytest.fixture(autouse=True)
def _needs_kernels(request: pytest.FixtureRequest) -> None:
    parameters = getattr(request.node, "callspec", None)
    if parameters and parameters.params.get("device") == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def theta_of(dtype: torch.dtype, device: str, shape: tuple[int, ...] | None = None) -> Tensor:
    shape = shape or (SIZE[device],)
    generator = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def values(theta: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None or not residual.numel():
        return theta.double().cpu().flatten()
    return torch.from_numpy(oracle.join(theta.cpu(), residual.cpu())).double()


def compare(run: Run, theta: Tensor, rounding: Rounding, bound: float) -> None:
    """``run(operators, theta, residuals)`` by kernels and reference; ``bound`` on what moves theta."""
    results = []
    for operators in (torch.ops.zoext, _reference):
        moved = theta.clone()
        residuals = (
            [oracle.some_residuals(theta.cpu()).to(theta.device)] if rounding == Rounding.RESIDUAL else []
        )
        run(operators, moved, residuals)
        results.append((moved, residuals[0] if residuals else None))
    (kernels, _), (reference, _) = results
    assert not torch.equal(kernels, theta), "nothing moved"
    a, b = (values(*result) for result in results)
    size = a.abs() + bound
    rounded = theta.element_size() == 2
    # A float of 24 bits in two parts has 16 bits of mantissa for bfloat16, and 19 for float16.
    held = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-19}.get(theta.dtype, 0.0)
    error = bound * 2.0**-19 + size * LOST_ULPS * 2.0**-24 + size * held * (rounding == Rounding.RESIDUAL)
    if rounded and rounding != Rounding.RESIDUAL:
        unequal = oracle.bits(kernels) != oracle.bits(reference)
        assert int(unequal.sum()) <= theta.numel() / 1000
        error = error + size * torch.finfo(theta.dtype).eps  # the neighbour
    assert bool(((a - b).abs() <= error).all()), float(((a - b).abs() / error).max())


def place_of(theta: Tensor) -> tuple[list[int], list[int]]:
    """A key, and a block that is a part of a larger parameter."""
    return [2**31 + 7], [2**33 + 1, 173, 300] if theta.dim() == 1 else [5, theta.shape[1], theta.shape[1] + 3]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("distribution", Distribution)
@every_rounding
@every_dtype
@devices
def test_axpy(
    device: str, dtype: torch.dtype, rounding: Rounding, distribution: Distribution, steps: int
) -> None:
    theta = theta_of(dtype, device)
    seeds, coefficients = SEEDS[:steps].to(device), COEFFICIENTS[:steps].to(device)
    decay = torch.tensor([0.1, 0.0, 0.0, 0.01])[:steps].to(device)
    if steps == 1:
        seeds, coefficients, decay = seeds[0], coefficients[0], decay[0]

    def run(operators: Any, moved: Tensor, residuals: list[Tensor]) -> None:
        place = place_of(theta)
        operators.noise_axpy_([moved], residuals, seeds, coefficients, decay, *place, distribution, rounding)

    compare(run, theta, rounding, bound=6.0)


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("rule", Rule)
@every_rounding
@every_dtype
@devices
def test_window(device: str, dtype: torch.dtype, rounding: Rounding, rule: Rule, windows: int) -> None:
    theta = theta_of(dtype, device)
    for distribution in Distribution:

        def run(
            operators: Any, moved: Tensor, residuals: list[Tensor], distribution: Distribution = distribution
        ) -> None:
            numbers = window_of(windows, device)
            operators.noise_window_(
                [moved], residuals, *numbers, *place_of(theta), distribution, rounding, rule
            )

        compare(run, theta, rounding, bound=6.0)


def window_of(windows: int, device: str) -> list[Tensor]:
    """The rows above as windows of as many as there are left."""
    horizon = len(SEEDS) - windows + 1
    first, second = torch.linspace(0.1, 0.4, horizon), torch.linspace(0.4, 0.1, horizon)
    rates = torch.tensor([0.02, 0.01, 0.03])[:windows], torch.tensor([0.0, 0.1, 0.01])[:windows]
    if windows > 1:
        first, second = first.repeat(windows, 1), second.repeat(windows, 1)
    lr, decay = (rate if windows > 1 else rate[0] for rate in rates)
    numbers = SEEDS, COEFFICIENTS, first, second, lr, torch.tensor(1e-3), decay
    return [tensor.to(device) for tensor in numbers]


@pytest.mark.parametrize("form", ["row", "column", "square"])
@every_rounding
@every_dtype
@devices
def test_factored(device: str, dtype: torch.dtype, rounding: Rounding, form: str) -> None:
    size, side = SIZE[device], SIDE[device]
    shape = {"row": (1, size), "column": (size, 1), "square": (side, side)}[form]
    theta = theta_of(dtype, device, shape)
    rows, columns = shape
    generator = torch.Generator().manual_seed(5)
    count = SEEDS.numel()
    left = torch.randn(count, 2, rows, generator=generator).to(device)
    right = torch.randn(1, 2, columns, generator=generator).to(device)
    decay = torch.tensor([0.1, 0.0, 0.0, 0.01], device=device)
    steps = SEEDS.to(device), COEFFICIENTS.to(device)

    def axpy(operators: Any, moved: Tensor, residuals: list[Tensor]) -> None:
        operators.factored_axpy_(
            [moved], residuals, [left], [right], *steps, decay, *place_of(theta), rounding
        )

    compare(axpy, theta, rounding, bound=30.0)
    for rule in Rule:

        def window(operators: Any, moved: Tensor, residuals: list[Tensor], rule: Rule = rule) -> None:
            numbers = window_of(3, device)
            operators.factored_window_(
                [moved], residuals, [left], [right], *numbers, *place_of(theta), rounding, rule
            )

        # The sign of a sum that float32 cannot tell from zero may differ.
        if rule != Rule.SIGN:
            compare(window, theta, rounding, bound=30.0)


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
@every_dtype
@devices
def test_copies(device: str, dtype: torch.dtype, rounding: Rounding) -> None:
    side = SIDE[device]
    theta = theta_of(dtype, device, (side, side))
    before = theta.clone()
    steps = SEEDS[0].to(device), COEFFICIENTS[0].to(device)
    factors = [torch.linspace(-1, 1, 2 * side, device=device).reshape(1, 2, side)]
    copies: list[Run] = [
        lambda operators, out, _: operators.noise_copy_(
            [out], [theta], *steps, *place_of(theta), 0, rounding
        ),
        lambda operators, out, _: operators.factored_copy_(
            [out], [theta], factors, factors, *steps, *place_of(theta), rounding
        ),
    ]
    for run in copies:
        compare(run, theta, rounding, bound=6.0)
        oracle.assert_same_bits(theta, before)


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
@every_dtype
@devices
def test_several_copies(device: str, dtype: torch.dtype, rounding: Rounding) -> None:
    theta = theta_of(dtype, device)
    terms = SEEDS[0].to(device), COEFFICIENTS.to(device)
    for copy in (0, 1, 3):

        def run(operators: Any, out: Tensor, _: list[Tensor], copy: int = copy) -> None:
            stack = out.new_empty((len(COEFFICIENTS), *theta.shape))
            operators.noise_copies_([stack], [theta], *terms, *place_of(theta), 0, rounding)
            out.copy_(stack[copy])

        compare(run, theta, rounding, bound=6.0)


@pytest.mark.parametrize("shared", ["", "left", "right", "left right"])
@every_dtype
@devices
def test_factored_linear(device: str, dtype: torch.dtype, shared: str) -> None:
    """Also of a copy without terms, and of factors that are not finite and have a coefficient of zero."""
    generator = torch.Generator().manual_seed(6)
    sizes = (1 if "left" in shared else 3, 2, 43), (1 if "right" in shared else 3, 2, SIDE[device])
    left, right = (torch.randn(size, generator=generator) for size in sizes)
    coefficients = torch.tensor([[0.3, -2.0, 0.0], [0.0, -0.0, 0.0], [0.5, 0.0, 0.0]])
    left[-1, 1, 3] = float("nan") if "left" not in shared else 1.0
    right[-1, 0, 7] = float("inf") if "right" not in shared else 1.0
    factors = [tensor.to(device) for tensor in (left, right, coefficients)]
    out, input = (
        torch.randn(3, 29, length, generator=generator).to(dtype).to(device) for length in (43, SIDE[device])
    )
    results = []
    for operators in (torch.ops.zoext, _reference):
        results.append(out.clone())
        operators.factored_linear_(results[-1], input, *factors)
    kernels, reference = results
    assert not torch.equal(kernels[0], out[0])
    oracle.assert_same_bits(reference[1], out[1])
    # Sums of up to 200 products, of which each is rounded.
    accumulated = 1e-13 if dtype == torch.float64 else 1e-5
    relative = accumulated + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0)
    torch.testing.assert_close(reference, kernels, rtol=relative, atol=100 * accumulated)


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, result)):
            assert not isinstance(value, Tensor) or value.dtype != torch.float64, func
        return result


@pytest.fixture
def no_float64() -> Iterator[None]:
    """Fails the test on a tensor of float64."""
    with _NoFloat64():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("no_float64")
def test_narrower_weights_need_no_float64(dtype: torch.dtype) -> None:
    theta = torch.ones(7, 9).to(dtype)
    place = place_of(theta)
    one = torch.ones(1, 2, 7), torch.ones(1, 2, 9)
    steps = SEEDS[0], COEFFICIENTS[0]
    numbers = window_of(3, "cpu")
    for rounding in Rounding:
        residuals = (
            [torch.zeros(7, 9, dtype=torch.int8)] if dtype != torch.float32 else [torch.empty(0).char()]
        )
        own = residuals if rounding == Rounding.RESIDUAL else []
        decay = torch.tensor(0.1)
        for distribution in Distribution:
            _reference.noise_axpy_([theta], own, *steps, decay, *place, distribution, rounding)
        _reference.factored_axpy_([theta], own, [one[0]], [one[1]], *steps, decay, *place, rounding)
        for rule in Rule:
            _reference.noise_window_([theta], own, *numbers, *place, 0, rounding, rule)
            _reference.factored_window_([theta], own, [one[0]], [one[1]], *numbers, *place, rounding, rule)
    _reference.normal_([theta], SEEDS[0, :1], *place, 0, 0)
    _reference.noise_copies_([theta.repeat(4, 1, 1)], [theta], SEEDS[0], COEFFICIENTS, *place, 0, 1)
    rows, out = theta.repeat(4, 1, 1), torch.ones(4, 7, 7).to(dtype)
    for count in (1, 3):
        sides = torch.ones(3, 2, 7), torch.ones(count, 2, 9)
        _reference.factored_linear_(out, rows, *sides, COEFFICIENTS)
    _reference.power_iteration(theta, None, SEEDS[0, :1], 3, 2)


def test_the_kernels_are_registered_for_devices_without_their_own() -> None:
    for operator in _reference.OPERATORS:
        dump = torch._C._dispatch_dump(f"zoext::{operator.__name__}")
        keys = {line.split(":")[0] for line in dump.splitlines()}
        assert set(_reference.DISPATCH_KEYS) <= keys
        assert "library.cpp" in dump, "CPU has kernels of its own"
        assert "Composite" not in dump, "CUDA without kernels must raise"


def test_no_operator_was_forgotten() -> None:
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zoext::")}
    assert {f"zoext::{operator.__name__}" for operator in _reference.OPERATORS} == known


def test_leaves_that_require_grad_and_inference_tensors_move_as_others_do() -> None:
    def moved(theta: Tensor) -> Tensor:
        arguments = [], SEEDS[0], COEFFICIENTS[0], torch.tensor(0.1), *place_of(theta), 0, 0
        _reference.noise_axpy_([theta], *arguments)
        return theta.detach().clone()

    expected = moved(torch.ones(9))
    leaf = torch.ones(9, requires_grad=True)
    oracle.assert_same_bits(moved(leaf), expected)
    with torch.inference_mode():
        theta = torch.ones(9)
    _reference.noise_axpy_([theta], [], SEEDS[0], COEFFICIENTS[0], torch.tensor(0.1), *place_of(theta), 0, 0)
    oracle.assert_same_bits(theta.clone(), expected)
    basis, values = _reference.power_iteration(leaf.reshape(3, 3), None, SEEDS[0, :1], 1, 1)
    assert not basis.is_inference()
    assert not values.requires_grad
