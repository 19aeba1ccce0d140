"""Bad arguments raise before anything is written, with the argument's name and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoext import _C, noise, ops

pytestmark = pytest.mark.usefixtures("backend")

GUARD = 7.0


def five(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((5,), GUARD).to(dtype)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((2, 3), GUARD).to(dtype)


ARRANGEMENT = {"keys": [0, 1], "spans": [(0, 5, 0), (5, 6, 0)]}
# Arguments of any operator on two tensors called `name`, and the error they must give.
BAD_TENSORS = [
    ([five(), rows().T], r"{name}\[1\] is not contiguous; pass tensor.contiguous\(\)"),
    ([five(), rows()[:, :2]], r"{name}\[1\] is not contiguous"),
    ([five(torch.int32), rows()], r"{name}\[0\] must be float32, float64, bfloat16 or float16"),
    ([five(), rows(torch.complex64)], r"{name}\[1\] must be float32"),
    ([five(), rows(torch.bool)], r"{name}\[1\] must be float32"),
    ([five(), rows(torch.float8_e4m3fn)], r"{name}\[1\] must be float32"),
]
BAD_PLACES = [
    ({"keys": [0]}, "keys must have one and spans three numbers per tensor; there are 2 tensors, 1 keys"),
    (
        {"spans": [(0, 5, 0)]},
        "there are 2 tensors, 2 keys and 3 span numbers",
    ),
    ({"keys": [0, -1]}, r"keys\[1\] must be in 0 .. 2\^32 - 1, not -1"),
    ({"keys": [2**32, 0]}, r"keys\[0\] must be in 0 .. 2\^32 - 1, not 4294967296"),
    ({"spans": [(0, 5, 0), (-1, 6, 0)]}, r"spans\[1\] must have base >= 0, .* not \(-1, 6, 0\)"),
    ({"spans": [(0, 0, 0), (5, 6, 0)]}, r"spans\[0\] must have .* run >= 1 .* not \(0, 0, 0\)"),
    ({"spans": [(0, 5, -3), (5, 6, 0)]}, r"spans\[0\] must have .* stride >= 0, not \(0, 5, -3\)"),
    ({"spans": [(2**63 - 4, 5, 0), (5, 6, 0)]}, r"spans\[0\] must end below 2\^63"),
    ({"spans": [(0, 5, 0), (0, 1, 2**61)]}, r"spans\[1\] must end below 2\^63"),
]
BAD_SEEDS = [
    ({"seeds": torch.tensor([1.0, 2.0])}, "seeds must be a contiguous int64 tensor of one dimension"),
    ({"seeds": torch.tensor([1, 2], dtype=torch.int32)}, "seeds must be a contiguous int64"),
    ({"seeds": torch.arange(4)[::2]}, "seeds must be a contiguous"),
    ({"coefficients": torch.ones(2).double()}, "coefficients must be a contiguous float32 tensor"),
    ({"coefficients": torch.ones(3)}, "coefficients must be .* with one element per seed"),
    ({"coefficients": torch.ones(4)[::2]}, "coefficients must be a contiguous"),
    ({"coefficients": torch.ones(1, 2)}, "coefficients must be"),
]
BAD_CHOICES = [
    ({"distribution": 2}, r"distribution must be 0 \(normal\) or 1 \(sign\), not 2"),
    ({"distribution": -1}, "distribution must be .* not -1"),
]
KNOWN_RULES = r"rule must be one of 0 \(adam\), 1 \(sign\), 2 \(scalar_adam\), not"
BAD_RULES = [({"rule": 3}, f"{KNOWN_RULES} 3"), ({"rule": -1}, f"{KNOWN_RULES} -1")]
# Of copies, whose seeds are those of a single step.
BAD_ROUNDINGS_OF_COPIES = [({"rounding": 2}, r"rounding must be 0 \(nearest\) or 1 \(stochastic\), not 2")]
ONE_STEP_OF_COPIES = [({"seeds": torch.tensor([[1, 2]])}, "seeds must be .* of one dimension")]
# Of operators that move theta.
PER_STEP = "a contiguous float32 tensor of one number for each step, 1, not of"
BAD_DECAYS = [
    ({"decay": torch.zeros(2)}, f"decay must be {PER_STEP} 2"),
    ({"decay": torch.zeros(()).double()}, f"decay must be {PER_STEP} 1"),
    ({"decay": 0.1}, "'decay'"),
]
BAD_ROUNDINGS = [
    ({"rounding": 3}, r"rounding must be 0 \(nearest\), 1 \(stochastic\) or 2 \(with residuals\), not 3"),
    ({"rounding": -1}, "rounding must be .* not -1"),
]


def residuals(dtype: torch.dtype = torch.int8, sizes: tuple[int, int] = (0, 0)) -> list[Tensor]:
    return [torch.zeros(size, dtype=dtype) for size in sizes]


def half(residuals: list[Tensor]) -> dict[str, Any]:
    """Arguments of theta in 16 bits with residuals."""
    theta = [five(torch.bfloat16), rows(torch.float16)]
    return {"theta": theta, "rounding": 2, "residuals": residuals}


ONE_EACH = "residuals must have one tensor per tensor of theta with rounding 2, else none; there are"
BAD_RESIDUALS = [
    ({"rounding": 2}, f"{ONE_EACH} 0 with rounding 2"),
    ({"rounding": 2, "residuals": residuals()[:1]}, f"{ONE_EACH} 1 with rounding 2"),
    ({"rounding": 1, "residuals": residuals()}, f"{ONE_EACH} 2 with rounding 1"),
    ({"residuals": residuals()}, f"{ONE_EACH} 2 with rounding 0"),
    (
        {"rounding": 2, "residuals": residuals(sizes=(0, 6))},
        r"residuals\[1\] must be a contiguous int8 tensor on the device of theta\[1\] with 0 elements",
    ),
    (half(residuals(sizes=(5, 5))), r"residuals\[1\] must be .* with 6 elements"),
    (half(residuals(sizes=(0, 6))), r"residuals\[0\] must be .* with 5 elements"),
    (half(residuals(torch.uint8, (5, 6))), r"residuals\[0\] must be a contiguous int8 tensor"),
    (half([torch.zeros(10, dtype=torch.int8)[::2], *residuals(sizes=(5, 6))[1:]]), r"residuals\[0\] must be"),
]
# Of several steps of two terms.
BAD_STEPS = [
    (
        {"seeds": torch.ones(3, 2, dtype=torch.int64), "coefficients": torch.ones(3, 2)},
        "decay must be a contiguous float32 tensor of one number for each step, 3, not of 1",
    ),
    (
        {"seeds": torch.ones(2, 1, dtype=torch.int64), "decay": torch.zeros(2)},
        "coefficients must be a contiguous float32 tensor with one element per seed",
    ),
    (
        {"seeds": torch.ones(1, 2, dtype=torch.int64), "coefficients": torch.ones(2, 1)},
        "coefficients must be .* with one element per seed",
    ),
    (
        {"seeds": torch.ones(1, 1, 2, dtype=torch.int64)},
        "seeds must be a contiguous int64 tensor of one dimension",
    ),
]
BAD_SEED = [
    ({"seed": torch.tensor([1, 2])}, "seed must hold one int64 number"),
    ({"seed": torch.tensor([1.0])}, "seed must hold one int64 number"),
    ({"stream": -1}, r"stream must be in 0 .. 2\^32 - 1, not -1"),
    ({"stream": 2**32}, r"stream must be in 0 .. 2\^32 - 1, not 4294967296"),
]
BAD_COPIES = [
    ({"out": [five()]}, "out and theta must be lists of one length, not 1 and 2"),
    ({"out": [five(), five()]}, r"out\[1\] must have the size, the dtype and the device of theta\[1\]"),
    ({"out": [five(torch.float16), rows()]}, r"out\[0\] must have the size, the dtype and the device"),
]
BAD_WINDOWS = [
    (
        {"seeds": torch.tensor([1, 2])},
        "seeds must be a contiguous int64 tensor of two dimensions: steps and terms",
    ),
    ({"seeds": torch.ones(3, 2)}, "seeds must be a contiguous int64 tensor of two dimensions"),
    ({"seeds": torch.ones(2, 3, dtype=torch.int64).T}, "seeds must be a contiguous int64"),
    (
        {"coefficients": torch.ones(3)},
        "coefficients must be a contiguous float32 tensor with one element per seed",
    ),
    ({"coefficients": torch.ones(2, 3)}, "coefficients must be .* with one element per seed"),
    ({"coefficients": torch.ones(3, 2).double()}, "coefficients must be a contiguous float32"),
    (
        {"first_weights": torch.ones(2)},
        "first_weights and second_weights must be .* per step of a window, which has 3 of 3 steps",
    ),
    ({"first_weights": torch.ones(3).double()}, "first_weights and second_weights must be .* float32"),
    ({"second_weights": torch.ones(3, 1)}, "first_weights and second_weights must be"),
    ({"second_weights": torch.ones(6)[::2]}, "first_weights and second_weights must be contiguous"),
    (
        {"first_weights": torch.ones(2, 3)},
        "one element per step of a window, a row for each window, which has 2 of 3 steps",
    ),
    (
        {"first_weights": torch.ones(2, 2), "second_weights": torch.ones(2)},
        "one element per step of a window, a row for each window",
    ),
    (
        {"first_weights": torch.ones(2, 2), "second_weights": torch.ones(2, 2)},
        "lr must be a contiguous float32 tensor of one number for each step, 2, not of 1",
    ),
    (
        {"first_weights": torch.ones(5, 0), "second_weights": torch.ones(5, 0)},
        "one element per step of a window",
    ),
]
BAD_RATES = [
    ({"lr": torch.zeros(2)}, f"lr must be {PER_STEP} 2"),
    ({"lr": 0.1}, "'lr'"),
    ({"eps": torch.zeros(()).double()}, "eps must hold one float32 number"),
    ({"eps": torch.zeros(0)}, "eps must hold one float32 number"),
]


def left(*, terms: int, rank: int = 2, rows: int = 2) -> list[Tensor]:
    return [torch.ones(terms, rank, 1), torch.ones(terms, rank, rows)]


def right(*, terms: int, rank: int = 2, columns: int = 3) -> list[Tensor]:
    return [torch.ones(terms, rank, 5), torch.ones(terms, rank, columns)]


def bad_factors(terms: int) -> list[tuple[dict[str, Any], str]]:
    return [
        ({"left": left(terms=terms)[:1]}, "there are 2 matrices, 1 left and 2 right factors"),
        ({"right": []}, "there are 2 matrices, 2 left and 0 right factors"),
        ({"left": [torch.ones(1, 2, 1).double(), *left(terms=1)[1:]]}, r"left\[0\] must be .* float32"),
        ({"right": [right(terms=1)[0], torch.ones(1, 3, 2).mT]}, r"right\[1\] must be a contiguous"),
        ({"right": [torch.ones(2, 5), right(terms=1)[1]]}, r"right\[0\] must be .* of three dimensions"),
        (
            {"left": left(terms=terms + 1)},
            rf"left\[0\] must have a factor for each of {terms} terms, or one for all, not {terms + 1}",
        ),
        ({"right": right(terms=0)}, rf"right\[0\] must have a factor for each of {terms} terms, .* not 0"),
        ({"left": left(terms=1, rank=3)}, r"left\[0\] and right\[0\] must have one rank, not 3 and 2"),
        (
            {"left": left(terms=1, rows=3)},
            r"theta\[1\] has 6 elements, but its factors are those of a matrix of 3 x 3",
        ),
        ({"right": right(terms=1, columns=2)}, r"theta\[1\] has 6 elements, .* a matrix of 2 x 2"),
    ]


def with_tensors(name: str) -> list[tuple[dict[str, Any], str]]:
    return [({name: bad}, message.format(name=name)) for bad, message in BAD_TENSORS]


def refused(operator: Any, good: dict[str, Any], bad: dict[str, Any], message: str) -> None:
    arguments = {**good, **bad}
    with pytest.raises(RuntimeError, match=message):  # of which NotImplementedError is one
        operator(**arguments)
    assert all((residual == 0).all() for residual in arguments.get("residuals", ()))
    for name in ("theta", "out"):
        for tensor in arguments.get(name, ()):
            assert (tensor.to(torch.complex64) == torch.full((), GUARD).to(tensor.dtype)).all()


def combination() -> dict[str, Any]:
    return {"seeds": torch.tensor([1, 2]), "coefficients": torch.ones(2), **ARRANGEMENT}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *with_tensors("theta"),
        *BAD_PLACES,
        *BAD_SEEDS,
        *BAD_STEPS,
        *BAD_DECAYS,
        *BAD_CHOICES,
        *BAD_ROUNDINGS,
        *BAD_RESIDUALS,
    ],
)
def test_axpy(bad: dict[str, Any], message: str) -> None:
    good = {"theta": [five(), rows()], "decay": torch.tensor(0.0), **combination()}
    refused(ops.noise_axpy_, good, bad, message)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *with_tensors("theta"),
        *with_tensors("out"),
        *BAD_PLACES,
        *BAD_SEEDS,
        *BAD_COPIES,
        *BAD_CHOICES,
        *BAD_ROUNDINGS_OF_COPIES,
        *ONE_STEP_OF_COPIES,
    ],
)
def test_copy(bad: dict[str, Any], message: str) -> None:
    good = {"out": [five(), rows()], "theta": [five(), rows()], **combination()}
    refused(ops.noise_copy_, good, bad, message)


def stack(count: int = 2) -> list[Tensor]:
    return [torch.full((count, 5), GUARD), torch.full((count, 2, 3), GUARD)]


BUFFER = torch.full((20,), GUARD)
BAD_STACKS = [
    ({"out": stack()[:1]}, "out and theta must be lists of one length, not 1 and 2"),
    (
        {"out": stack(3)},
        r"out\[0\] must have a copy of theta\[0\] for each row of coefficients, 2 of shape \[5\], not the "
        r"shape \[3, 5\]",
    ),
    ({"out": [stack()[0], torch.full((2, 6), GUARD)]}, r"out\[1\] .* 2 of shape \[2, 3\], .* \[2, 6\]"),
    ({"out": [stack()[0], torch.full((2, 3, 2), GUARD)]}, r"out\[1\] .*, not the shape \[2, 3, 2\]"),
    ({"out": [stack()[0].half(), stack()[1]]}, r"out\[0\] must have the dtype and the device of theta\[0\]"),
    (
        {"out": [BUFFER[:10].view(2, 5), stack()[1]], "theta": [BUFFER[9:14], rows()]},
        r"out\[0\] and theta\[0\] share memory; pass tensors that lie apart",
    ),
]
BAD_TERMS_OF_COPIES = [
    ({"seeds": torch.tensor([[1, 2]])}, "seeds must be a contiguous int64 tensor of one dimension, not of 2"),
    ({"seeds": torch.tensor([1.0, 2.0])}, "seeds must be a contiguous int64 tensor"),
    ({"coefficients": torch.ones(2)}, "coefficients must be .* of two dimensions: copies and terms"),
    ({"coefficients": torch.tensor(1.0)}, "coefficients must be .* of two dimensions"),
    ({"coefficients": torch.ones(2, 2).double()}, "coefficients must be a contiguous float32 tensor"),
    ({"coefficients": torch.ones(3, 2).T}, "coefficients must be a contiguous"),
    ({"coefficients": torch.ones(2, 3)}, "coefficients must have a column for each of 2 terms, not 3"),
]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *with_tensors("theta"),
        *with_tensors("out"),
        *BAD_PLACES,
        *BAD_TERMS_OF_COPIES,
        *BAD_STACKS,
        *BAD_CHOICES,
        *BAD_ROUNDINGS_OF_COPIES,
    ],
)
def test_copies(bad: dict[str, Any], message: str) -> None:
    good = {"out": stack(), "theta": [five(), rows()], **combination(), "coefficients": torch.ones(2, 2)}
    refused(ops.noise_copies_, good, bad, message)


def test_good_arguments_of_copies_are_good() -> None:
    out = stack()
    coefficients = torch.ones(2, 2)
    ops.noise_copies_(out, [five(), rows()], **{**combination(), "coefficients": coefficients})
    assert not any((tensor == GUARD).any() for tensor in out)


def window() -> dict[str, Any]:
    """Three steps of two terms."""
    weights = {"first_weights": torch.ones(3), "second_weights": torch.ones(3)}
    rates = {"lr": torch.tensor(0.1), "eps": torch.tensor(0.1), "decay": torch.tensor(0.0)}
    return {
        **ARRANGEMENT,
        "seeds": torch.arange(6).reshape(3, 2),
        "coefficients": torch.ones(3, 2),
        **weights,
        **rates,
    }


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *with_tensors("theta"),
        *BAD_PLACES,
        *BAD_WINDOWS,
        *BAD_RULES,
        *BAD_RATES,
        *BAD_DECAYS,
        *BAD_CHOICES,
        *BAD_ROUNDINGS,
        *BAD_RESIDUALS,
    ],
)
def test_noise_window(bad: dict[str, Any], message: str) -> None:
    refused(ops.noise_window_, {"theta": [five(), rows()], **window()}, bad, message)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *with_tensors("theta"),
        *BAD_PLACES,
        *BAD_SEEDS,
        *BAD_STEPS,
        *bad_factors(2),
        *BAD_DECAYS,
        *BAD_ROUNDINGS,
        *BAD_RESIDUALS,
    ],
)
def test_factored_axpy(bad: dict[str, Any], message: str) -> None:
    good = {"theta": [five(), rows()], "left": left(terms=2), "right": right(terms=1)}
    refused(ops.factored_axpy_, {**good, "decay": torch.tensor(0.0), **combination()}, bad, message)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *with_tensors("theta"),
        *with_tensors("out"),
        *BAD_PLACES,
        *BAD_SEEDS,
        *bad_factors(2),
        *BAD_COPIES,
        *BAD_ROUNDINGS_OF_COPIES,
        *ONE_STEP_OF_COPIES,
    ],
)
def test_factored_copy(bad: dict[str, Any], message: str) -> None:
    good = {"out": [five(), rows()], "theta": [five(), rows()]}
    sides = {"left": left(terms=2), "right": right(terms=1)}
    refused(ops.factored_copy_, {**good, **sides, **combination()}, bad, message)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *with_tensors("theta"),
        *BAD_PLACES,
        *BAD_WINDOWS,
        *BAD_RULES,
        *BAD_RATES,
        *bad_factors(6),
        *BAD_DECAYS,
        *BAD_ROUNDINGS,
        *BAD_RESIDUALS,
    ],
)
def test_factored_window(bad: dict[str, Any], message: str) -> None:
    good = {"theta": [five(), rows()], "left": left(terms=6), "right": right(terms=1)}
    refused(ops.factored_window_, {**good, **window()}, bad, message)


@pytest.mark.parametrize(("bad", "message"), [*with_tensors("out"), *BAD_PLACES, *BAD_SEED, *BAD_CHOICES])
def test_normal(bad: dict[str, Any], message: str) -> None:
    refused(ops.normal_, {"out": [five(), rows()], "seed": torch.tensor([1]), **ARRANGEMENT}, bad, message)


@pytest.mark.parametrize("shift", [1, 7])
@pytest.mark.parametrize("operator", [ops.noise_copy_, ops.factored_copy_])
def test_copy_over_a_part_of_itself(operator: Any, shift: int) -> None:
    buffer = torch.ones(24)
    theta, out = buffer[shift : shift + 15].view(5, 3), buffer[:15].view(5, 3)
    sides = [] if operator is ops.noise_copy_ else [[torch.ones(1, 2, 5)], [torch.ones(1, 2, 3)]]
    arguments = (*sides, torch.tensor([1]), torch.tensor([0.5]), [0], [(0, 15, 0)])
    for first, second in ((out, theta), (theta, out)):
        with pytest.raises(RuntimeError, match=r"out\[0\] must be theta\[0\] itself or lie apart from it"):
            operator([first], [second], *arguments)
    assert torch.equal(buffer, torch.ones(24))
    operator([out], [out], *arguments)
    assert not torch.equal(out, torch.ones(5, 3))


def test_good_arguments_of_these_tests_are_good() -> None:
    theta, out = [five(), rows()], [five(), rows()]
    ops.noise_axpy_(theta, decay=torch.tensor(0.0), **combination())
    ops.noise_copy_(out, theta, **combination())
    assert not torch.equal(out[0], theta[0])
    ops.normal_(out, torch.tensor([1]), **ARRANGEMENT)
    assert not any((tensor == GUARD).any() for tensor in (*theta, *out))
    theta = [five(), rows()]
    ops.noise_window_(theta, **window())
    assert not any((tensor == GUARD).any() for tensor in theta)
    theta = [five(), rows()]
    sides = left(terms=2), right(terms=1)
    ops.factored_axpy_(theta, *sides, decay=torch.tensor(0.0), **combination())
    ops.factored_copy_(out, theta, *sides, **combination())
    ops.factored_window_(theta, left(terms=6), right(terms=1), **window())
    assert not any((tensor == GUARD).any() for tensor in (*theta, *out))


def test_tensors_without_storage_are_refused() -> None:
    """Sparse and meta tensors have no kernel; torch itself says so."""
    for theta in (torch.ones(5).to_sparse(), torch.ones(5, device="meta")):
        with pytest.raises(NotImplementedError, match="zoext::noise_axpy_"):
            ops.noise_axpy_([theta], torch.tensor([1]), torch.ones(1), torch.tensor(0.0), [0], [(0, 5, 0)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"seed": 2**64},
            ValueError,
            "seed must fit into 64 bits, not 18446744073709551616; take",
        ),
        ({"seed": -(2**63) - 1}, ValueError, "seed must fit into 64 bits, not -9223372036854775809"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, not 1.5"),
        ({"seed": "one"}, TypeError, "seed must be an integer, not 'one'"),
        ({"seed": 1, "key": -1}, RuntimeError, r"keys\[0\] must be in 0 .. 2\^32 - 1, not -1"),
        ({"seed": 1, "stream": 2**32}, RuntimeError, r"stream must be in 0 .. 2\^32 - 1, not 4294967296"),
        (
            {"seed": 1, "dtype": torch.int32},
            TypeError,
            "dtype must be one of .*, not torch.int32",
        ),
    ],
)
def test_noise_normal(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noise.normal(3, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2**64, 0), ValueError, "seed must fit into 64 bits, not 18446744073709551616"),
        ((1.5, 0), TypeError, "seed must be an integer, not 1.5"),
        ((0, -1), ValueError, r"step must be an integer in 0 .. 2\^64 - 1, not -1"),
        ((0, 0.5), ValueError, "step must be an integer .* not 0.5"),
        ((0, 0, 2**32), ValueError, r"draw must be an integer in 0 .. 2\^32 - 1, not 4294967296"),
        ((0, 0, -1), ValueError, "draw must be an integer .* not -1"),
    ],
)
def test_step_seed(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noise.step_seed(*arguments)


def test_instruction_sets_that_are_not_there() -> None:
    before = _C.instruction_set()
    with pytest.raises(ValueError, match=r"'mmx' is not available here; use one of: .*scalar"):
        _C.use_instruction_set("mmx")
    assert _C.instruction_set() == before
