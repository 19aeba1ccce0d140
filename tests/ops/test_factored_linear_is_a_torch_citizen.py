"""``factored_linear_`` behaves as torch's own operators, and refuses bad arguments by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from support import oracle
from zoext import ops


def arguments(dtype: torch.dtype = torch.float32, rows: int = 4) -> dict[str, Tensor]:
    """Two copies of rows of 5 features and 3 outputs, and three terms of rank 2."""
    return {
        "out": torch.ones(2, rows, 3).to(dtype),
        "input": torch.linspace(-1, 1, 10 * rows).reshape(2, rows, 5).to(dtype),
        "left": torch.linspace(-1, 1, 18).reshape(3, 2, 3),
        "right": torch.linspace(1, -2, 10).reshape(1, 2, 5),
        "coefficients": torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.0, 1.0]]),
    }


def run(**given: Tensor) -> Tensor:
    ops.factored_linear_(**given)
    return given["out"]


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    operator = torch.ops.zoext.factored_linear_.default
    report = torch.library.opcheck(operator, tuple(arguments(dtype).values()))
    assert set(report.values()) == {"SUCCESS"}


def test_fake_tensors() -> None:
    with FakeTensorMode():
        out = run(**arguments(torch.bfloat16))
    assert isinstance(out, FakeTensor)
    assert out.shape == (2, 4, 3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_changes_no_bit(backend: str) -> None:
    """Beside a layer, with other coefficients and other factors in every step."""

    def layer(weight: Tensor, given: dict[str, Tensor]) -> Tensor:
        out = torch.nn.functional.linear(given["input"], weight)
        ops.factored_linear_(out, given["input"], given["left"], given["right"], given["coefficients"])
        return out + 0

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    weight = torch.zeros(3, 5)
    for step in range(1, 4):
        given = arguments()
        given["coefficients"], given["left"] = given["coefficients"] * step, given["left"] - step
        oracle.assert_same_bits(compiled(weight, given), layer(weight, given))
    assert counter.frame_count == 1


def test_the_version_of_out_is_bumped() -> None:
    given = arguments()
    versions = {name: tensor._version for name, tensor in given.items()}
    base = torch.ones(8, 3, requires_grad=True)
    squares = base**2
    with torch.no_grad():
        run(**{**given, "out": base.view(2, 4, 3)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()
    run(**given)
    bumped = {name for name, tensor in given.items() if tensor._version > versions[name]}
    assert bumped == {"out"}


def test_inference_mode_and_inputs_that_require_grad() -> None:
    expected = run(**arguments())
    with torch.inference_mode():
        inference = run(**arguments())
    with torch.no_grad():
        leaves = run(**{name: tensor.requires_grad_() for name, tensor in arguments().items()})
    oracle.assert_same_bits(inference.clone(), expected)
    oracle.assert_same_bits(leaves.detach(), expected)


@pytest.mark.usefixtures("backend")
def test_no_rows_no_copies_and_no_terms() -> None:
    assert run(**arguments(rows=0)).shape == (2, 0, 3)
    given = arguments()
    nothing = {
        "out": given["out"][:0],
        "input": given["input"][:0],
        "coefficients": given["coefficients"][:0],
    }
    assert run(**{**given, **nothing}).shape == (0, 4, 3)
    without_terms = {"left": given["left"][:0], "coefficients": torch.empty(2, 0)}
    assert torch.equal(run(**{**given, **without_terms}), torch.ones(2, 4, 3))


BAD = [
    (
        {"out": torch.ones(8, 3)},
        r"out must have three dimensions: copies, rows and outputs, not the shape \[8, 3\]",
    ),
    ({"input": torch.ones(8, 5)}, r"input must have three dimensions: .* pass tensor.reshape\(copies, -1"),
    ({"out": torch.ones(2, 3, 4).mT}, r"out is not contiguous; pass tensor.contiguous\(\)"),
    ({"input": torch.ones(2, 5, 4).mT}, "input is not contiguous"),
    ({"out": torch.ones(2, 4, 3).int()}, "out must be float32, float64, bfloat16 or float16"),
    ({"input": torch.ones(2, 4, 5).half()}, "input must have the dtype and the device of out"),
    (
        {"input": torch.ones(2, 3, 5)},
        r"input and out must have the same copies and rows, not the shapes \[2, 3, 5\] and \[2, 4, 3\]",
    ),
    (
        {"coefficients": torch.ones(3)},
        "coefficients must be .* of two dimensions: copies and terms of a copy",
    ),
    ({"coefficients": torch.ones(2, 3).double()}, "coefficients must be a contiguous float32 tensor"),
    ({"coefficients": torch.ones(1, 3)}, "coefficients must have a row for each of 2 copies of out, not 1"),
    (
        {"left": torch.ones(2, 3)},
        r"left must be a contiguous float32 tensor of three dimensions: .* \[2, 3\]",
    ),
    ({"right": torch.ones(1, 2, 5).bfloat16()}, "right must be a contiguous float32 tensor"),
    ({"left": torch.ones(3, 3, 2).mT}, "left must be a contiguous"),
    (
        {"left": torch.ones(2, 2, 3)},
        "left must have a factor for each of 3 columns of coefficients, .* not 2",
    ),
    ({"right": torch.ones(4, 2, 5)}, "right must have a factor for each of 3 .* or one for all, not 4"),
    (
        {"left": torch.ones(3, 0, 3), "right": torch.ones(1, 0, 5)},
        r"left must have a rank of at least 1, not the shape \[3, 0, 3\]",
    ),
    ({"left": torch.ones(3, 2, 5)}, "left must have as many numbers as the layer has outputs, 3, not 5"),
    ({"right": torch.ones(1, 2, 3)}, "right must have as many numbers as the layer has features, 5, not 3"),
    ({"left": torch.ones(3, 1, 3)}, "left and right must have one rank, not 1 and 2"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
@pytest.mark.usefixtures("backend")
def test_bad_arguments_are_refused(bad: dict[str, Any], message: str) -> None:
    given = {**arguments(), **bad}
    before = {name: tensor.clone() for name, tensor in given.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.factored_linear_(**given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.items())


@pytest.mark.usefixtures("backend")
def test_an_out_that_shares_memory_is_refused() -> None:
    buffer = torch.ones(40)
    for name, shared in (("input", buffer[20:].view(2, 2, 5)), ("left", buffer[11:29].view(3, 2, 3))):
        given = {**arguments(rows=2), "out": buffer[12:24].view(2, 2, 3), name: shared}
        with pytest.raises(RuntimeError, match=f"out and {name} share memory; pass an out that lies apart"):
            ops.factored_linear_(**given)
    assert torch.equal(buffer, torch.ones(40))
