"""The operators behave as torch's own: opcheck, FakeTensor, torch.compile, version counters, memory."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from support import oracle
from zoext import ops
from zoext.ops import Distribution, Rounding, Stream

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
KEYS, SPANS = [3, 9], [(2, 5, 0), (7, 4, 11)]


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.arange(5.0).to(dtype), torch.arange(12.0).to(dtype).reshape(3, 4)]


def numbers(seed: int = 5, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.tensor([seed, -seed]), torch.tensor([0.5, -2.0]) * scale


def window(steps: int = 2) -> list[Tensor]:
    """Seeds, coefficients, weights, lr, eps and decay of as many steps of one term."""
    one = torch.ones(steps)
    rates = [torch.tensor(number) for number in (0.01, 1e-3, 0.1)]
    return [torch.arange(steps)[:, None], one[:, None] / 2, one / 4, one / 8, *rates]


def residuals_of(theta: list[Tensor]) -> list[Tensor]:
    return [oracle.some_residuals(t) for t in theta]


def factors(theta: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Left factors of rank 3 for each of two terms, a right one for both; a vector is a matrix of one row."""
    shapes = [t.shape if t.dim() == 2 else (1, t.numel()) for t in theta]
    left = [torch.linspace(-1, 1, 6 * rows).reshape(2, 3, rows) for rows, _ in shapes]
    return left, [torch.linspace(-1, 1, 3 * columns).reshape(1, 3, columns) for _, columns in shapes]


# The operators with one signature, to be run over a list of tensors.
def axpy(theta: list[Tensor]) -> list[Tensor]:
    ops.noise_axpy_(theta, *numbers(), torch.tensor(0.1), KEYS, SPANS)
    return theta


def copy(theta: list[Tensor]) -> list[Tensor]:
    out = [torch.empty_like(t) for t in theta]
    ops.noise_copy_(out, theta, *numbers(), KEYS, SPANS)
    return out


def copies(theta: list[Tensor]) -> list[Tensor]:
    out = [t.new_empty((2, *t.shape)) for t in theta]
    seeds, coefficients = numbers()
    ops.noise_copies_(out, theta, seeds, torch.stack([coefficients, -coefficients]), KEYS, SPANS)
    return [both[1] for both in out]


def normal(theta: list[Tensor]) -> list[Tensor]:
    ops.normal_(theta, torch.tensor([5]), KEYS, SPANS, stream=Stream.LEFT_FACTOR)
    return theta


def adam(theta: list[Tensor]) -> list[Tensor]:
    ops.noise_window_(theta, *window(), KEYS, SPANS)
    return theta


def factored_axpy(theta: list[Tensor]) -> list[Tensor]:
    ops.factored_axpy_(theta, *factors(theta), *numbers(), torch.tensor(0.1), KEYS, SPANS)
    return theta


def factored_copy(theta: list[Tensor]) -> list[Tensor]:
    out = [torch.empty_like(t) for t in theta]
    ops.factored_copy_(out, theta, *factors(theta), *numbers(), KEYS, SPANS)
    return out


def factored_adam(theta: list[Tensor]) -> list[Tensor]:
    ops.factored_window_(theta, *factors(theta), *window(), KEYS, SPANS)
    return theta


def axpy_of_steps(theta: list[Tensor]) -> list[Tensor]:
    ops.noise_axpy_(theta, *(n[:, None] for n in numbers()), torch.tensor([0.1, 0.2]), KEYS, SPANS)
    return theta


COPIES = [copy, copies, factored_copy]
OPERATORS = [axpy, *COPIES, normal, adam, factored_axpy, factored_adam, axpy_of_steps]
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)


@pytest.mark.parametrize("distribution", Distribution)
@every_dtype
def test_opcheck(dtype: torch.dtype, distribution: Distribution) -> None:
    """Schema (what is mutated, what aliases), autograd registration, FakeTensor, and dynamic AOT tracing."""
    terms, decay = numbers(), torch.tensor(0.1)
    spans, options = [n for span in SPANS for n in span], (int(distribution), int(Rounding.STOCHASTIC))
    field, theta, zoext = torch.tensor([5]), tensors(dtype), torch.ops.zoext
    of_copies = terms[0], terms[1][None]
    long = tensors(dtype), residuals_of(theta)
    with_residuals = int(distribution), int(Rounding.RESIDUAL)
    for operator, arguments in (
        (zoext.normal_, (theta, field, KEYS, spans, 1, int(distribution))),
        (zoext.noise_axpy_, (theta, [], *terms, decay, KEYS, spans, *options)),
        (zoext.noise_axpy_, (*long, *terms, decay, KEYS, spans, *with_residuals)),
        (zoext.noise_copy_, (theta, tensors(dtype), *terms, KEYS, spans, *options)),
        (zoext.noise_copies_, ([t[None] for t in theta], tensors(dtype), *of_copies, KEYS, spans, *options)),
        *((zoext.noise_window_, (theta, [], *window(), KEYS, spans, *options, rule)) for rule in range(3)),
        (zoext.noise_window_, (*long, *window(), KEYS, spans, *with_residuals, 0)),
    ):
        report = torch.library.opcheck(operator.default, arguments)
        assert set(report.values()) == {"SUCCESS"}


@every_dtype
def test_opcheck_of_factored_operators(dtype: torch.dtype) -> None:
    terms, decay = numbers(), torch.tensor(0.1)
    arrangement = KEYS, [n for span in SPANS for n in span]
    places, with_residuals = (
        (*arrangement, int(rounding)) for rounding in (Rounding.STOCHASTIC, Rounding.RESIDUAL)
    )
    theta, sides, zoext = tensors(dtype), factors(tensors(dtype)), torch.ops.zoext
    long = tensors(dtype), residuals_of(theta)
    for operator, arguments in (
        (zoext.factored_axpy_, (theta, [], *sides, *terms, decay, *places)),
        (zoext.factored_axpy_, (*long, *sides, *terms, decay, *with_residuals)),
        (zoext.factored_copy_, (tensors(dtype), theta, *sides, *terms, *places)),
        *((zoext.factored_window_, (theta, [], *sides, *window(), *places, rule)) for rule in range(3)),
        (zoext.factored_window_, (*long, *sides, *window(), *with_residuals, 0)),
    ):
        report = torch.library.opcheck(operator.default, arguments)
        assert set(report.values()) == {"SUCCESS"}


@every_operator
def test_fake_tensors(operator: Callable[[list[Tensor]], list[Tensor]]) -> None:
    with FakeTensorMode():
        out = operator(tensors(torch.bfloat16))
    assert all(isinstance(t, FakeTensor) for t in out)
    assert [(t.dtype, tuple(t.shape)) for t in out] == [(torch.bfloat16, (5,)), (torch.bfloat16, (3, 4))]


def needs_compiler(backend: str) -> Any:
    missing = backend == "inductor" and not shutil.which("c++")
    return pytest.param(backend, marks=pytest.mark.skipif(missing, reason="inductor needs a C++ compiler"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own import
@pytest.mark.parametrize("backend", [needs_compiler("aot_eager"), needs_compiler("inductor")])
def test_compiled_steps_are_compiled_once_and_change_no_bit(backend: str) -> None:
    """Seeds, coefficients, decay, keys and offsets change in every step. Two graphs: torch takes every
    number for a constant at first, and for a variable from the first change on."""

    def step(
        theta: list[Tensor], seeds: Tensor, c: Tensor, decay: Tensor, keys: list[int], base: int
    ) -> list:
        spans = [(base, 5, 0), (base + 3, 4, 11)]
        ops.noise_axpy_(theta, seeds, c, decay, keys, spans, rounding=Rounding.STOCHASTIC)
        out = [torch.zeros_like(t) for t in theta]
        ops.noise_copy_(out, theta, seeds, c, keys, spans)
        stacks = [t.new_zeros((2, *t.shape)) for t in theta]
        ops.noise_copies_(stacks, theta, seeds, torch.stack([c, -c]), keys, spans)
        ops.normal_(theta[:1], seeds[:1], keys[:1], spans[:1])
        steps = seeds[:, None], c[:, None], c * c, c * c, c[0], c[1] * c[1], decay
        ops.noise_window_(theta, *steps, keys, spans)
        ops.factored_axpy_(theta, *factors(theta), seeds, c, decay, keys, spans)
        ops.factored_copy_(out, theta, *factors(theta), seeds, c, keys, spans, rounding=Rounding.STOCHASTIC)
        ops.factored_window_(theta, *factors(theta), *steps, keys, spans)
        residuals = [torch.zeros_like(t, dtype=torch.int8) for t in theta]
        with_residuals: dict[str, Any] = {"rounding": Rounding.RESIDUAL, "residuals": residuals}
        steps_of_one_term = seeds[:, None], c[:, None], c * c
        ops.noise_axpy_(theta, *steps_of_one_term, keys, spans, **with_residuals)
        ops.factored_axpy_(theta, *factors(theta), *steps_of_one_term, keys, spans, **with_residuals)
        return [t + 0 for t in (*theta, *out, *stacks, *residuals)]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for call in range(2, 8):
        changing = (
            *numbers(2**40 * call, 0.1 * call),
            torch.tensor(0.01 * call),
            [call, 2 * call],
            10**10 * call,
        )
        plain, traced = tensors(torch.bfloat16), tensors(torch.bfloat16)
        expected = step(plain, *changing)
        for a, e in zip([*compiled(traced, *changing), *traced], [*expected, *plain], strict=True):
            oracle.assert_same_bits(a, e, f"call {call}")
    assert counter.frame_count <= 2


def test_versions_of_written_residuals_are_bumped() -> None:
    theta = tensors(torch.bfloat16)
    residuals = residuals_of(theta)
    options: dict[str, Any] = {"rounding": Rounding.RESIDUAL, "residuals": residuals}
    for call in (
        lambda: ops.noise_axpy_(theta, *numbers(), torch.tensor(0.1), KEYS, SPANS, **options),
        lambda: ops.noise_window_(theta, *window(), KEYS, SPANS, **options),
        lambda: ops.factored_axpy_(
            theta, *factors(theta), *numbers(), torch.tensor(0.1), KEYS, SPANS, **options
        ),
        lambda: ops.factored_window_(theta, *factors(theta), *window(), KEYS, SPANS, **options),
    ):
        before = [t._version for t in residuals]
        call()
        assert all(t._version > version for t, version in zip(residuals, before, strict=True))


def test_versions_of_written_tensors_are_bumped() -> None:
    for operator in OPERATORS:
        theta = tensors()
        before = [t._version for t in theta]
        out = operator(theta)
        bumped = [t._version > v for t, v in zip(theta, before, strict=True)]
        assert bumped == [operator not in COPIES] * 2, operator.__name__
        assert all(t._version > 0 for t in out), operator.__name__


@every_operator
def test_autograd_notices_that_a_saved_tensor_was_overwritten(operator: Callable) -> None:
    theta = [t.requires_grad_() for t in tensors()]
    losses = [(t**2).sum() for t in theta]
    with torch.no_grad():
        operator(theta)
    if operator in COPIES:
        losses[0].backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses[0].backward()


@every_operator
def test_leaves_that_require_grad_and_inference_tensors_move_as_others_do(operator: Callable) -> None:
    expected = operator(tensors())
    with torch.no_grad():
        leaves = operator([t.requires_grad_() for t in tensors()])
    with torch.inference_mode():
        inference = operator(tensors())
    outside = operator([t.clone() for t in expected])  # and no mode is left behind
    assert not any(t.is_inference() for t in outside)
    for a, b, e in zip(leaves, inference, expected, strict=True):
        oracle.assert_same_bits(a, e)
        oracle.assert_same_bits(b.clone(), e)


@every_operator
def test_inference_tensors_move_outside_inference_mode_too(operator: Callable) -> None:
    with torch.inference_mode():
        theta = tensors()
    for a, e in zip(operator(theta), operator(tensors()), strict=True):
        oracle.assert_same_bits(a, e)


@every_operator
def test_global_generators_are_neither_read_nor_moved(operator: Callable) -> None:
    states, results = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        results.append(operator(tensors()))
        states.append((before, (torch.get_rng_state(), np.random.get_state()[1], random.getstate())))
    for (torch0, numpy0, python0), (torch1, numpy1, python1) in states:
        assert torch.equal(torch0, torch1)
        assert np.array_equal(numpy0, numpy1)
        assert python0 == python1
    for a, b in zip(*results, strict=True):
        oracle.assert_same_bits(a, b)


def test_empty_lists_and_empty_tensors_are_fine() -> None:
    ops.noise_axpy_([], *numbers(), torch.tensor(0.0), [], [])
    ops.noise_copy_([], [], *numbers(), [], [])
    ops.noise_copies_([], [], *numbers(), [], [])
    ops.normal_([], torch.tensor([1]), [], [])
    empty = torch.empty(0, 7)
    ops.noise_axpy_([empty], *numbers(), torch.tensor(0.0), [0], [(0, 1, 0)])
    ops.noise_window_([], *window(), [], [])
    ops.noise_window_([empty], *window(), [0], [(0, 1, 0)])
    for matrices in ([], [empty], [empty.T.contiguous()]):
        place = [0] * len(matrices), [(0, 1, 0)] * len(matrices)
        ops.factored_axpy_(matrices, *factors(matrices), *numbers(), torch.tensor(0.1), *place)
        ops.factored_copy_(matrices, matrices, *factors(matrices), *numbers(), *place)
        ops.factored_window_(matrices, *factors(matrices), *window(), *place)


PEAK_MEMORY = """
import torch
from zoext import ops
from zoext.ops import Distribution, Rounding

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def run(theta, out, residual):
    seeds, coefficients = torch.tensor([1, 2, 3]), torch.tensor([0.1, 0.2, 0.3])
    decay, decays = torch.tensor(0.1), torch.tensor([0.1, 0.2, 0.3])
    place = [0], [ops.span_of(theta)]
    for distribution in Distribution:
        for rounding in Rounding:
            residuals = [residual] if rounding == Rounding.RESIDUAL else []
            options = {"rounding": rounding, "residuals": residuals}
            terms = seeds, coefficients
            steps = seeds[:, None], coefficients[:, None]
            ops.noise_axpy_([theta], *terms, decay, *place, distribution=distribution, **options)
            ops.noise_axpy_([theta], *steps, decays, *place, distribution=distribution, **options)
            window = *steps, coefficients, coefficients, decay, decay, decay
            windows = *steps, torch.ones(2, 2), torch.ones(2, 2), decays[:2], decay, decays[:2]
            ops.noise_window_([theta], *window, *place, distribution=distribution, **options)
            ops.noise_window_([theta], *windows, *place, distribution=distribution, **options)
            sides = [torch.ones(1, 2, theta.shape[0])], [torch.ones(3, 2, theta.shape[1])]
            ops.factored_axpy_([theta], *sides, *terms, decay, *place, **options)
            ops.factored_axpy_([theta], *sides, *steps, decays, *place, **options)
            ops.factored_window_([theta], *sides, *window, *place, **options)
            ops.factored_window_([theta], *sides, *windows, *place, **options)
            if rounding != Rounding.RESIDUAL:
                ops.noise_copy_([out], [theta], *terms, *place, distribution=distribution, rounding=rounding)
                ops.factored_copy_([out], [theta], *sides, *terms, *place, rounding=rounding)
                stack = out.view(2, theta.shape[0] // 2, theta.shape[1])
                options = {"distribution": distribution, "rounding": rounding}
                half, coefficients_of_copies = theta[: len(theta) // 2], torch.ones(2, 3)
                ops.noise_copies_([stack], [half], seeds, coefficients_of_copies, *place, **options)
        ops.normal_([out], seeds[:1], *place, distribution=distribution)

def weights(rows, columns):
    theta, out = (torch.zeros(rows, columns, dtype=torch.bfloat16) for _ in range(2))
    return theta, out, torch.zeros(rows, columns, dtype=torch.int8)

run(*weights(300, 1000))
rows, columns = 2**11, 2**13
theta, out, residual = weights(rows, columns)
before = peak()
run(theta, out, residual)
used = peak() - before
theta + out
print(used, peak() - before, 2 * rows * columns)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_nothing_proportional_to_a_parameter_is_allocated() -> None:
    """Peak resident memory of a fresh process. That the meter sees one temporary tensor is checked too."""
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True)
    used, with_temporary, parameter = map(int, done.stdout.split())
    assert with_temporary >= 0.9 * parameter
    assert used <= parameter / 16
