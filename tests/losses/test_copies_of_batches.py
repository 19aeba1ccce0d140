"""A repeated batch is one whole batch after the other, and what cannot be repeated is named."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

import zoext

Pair = namedtuple("Pair", ["x", "y"])
TOKENS = torch.arange(15).reshape(5, 3)
MASK = torch.rand(5, 1, 2, generator=torch.Generator().manual_seed(1)) < 0.5
WEIGHT = torch.linspace(0, 1, 5)


@dataclass(frozen=True)
class Record:
    tokens: Tensor
    name: str


def blocks(tensor: Tensor, copies: int) -> list[Tensor]:
    assert tensor.is_contiguous()
    return list(tensor.chunk(copies))


def assert_copies(got: Tensor, of: Tensor, copies: int) -> None:
    assert got.dtype == of.dtype
    assert torch.equal(got, torch.cat([of] * copies))
    assert torch.equal(got, of.repeat(copies, *[1] * (of.dim() - 1)))


@pytest.mark.parametrize("copies", [2, 3])
def test_every_tensor_of_a_nested_batch_is_repeated(copies: int) -> None:
    batch = {"a": TOKENS, "b": [MASK, (WEIGHT, None)], "c": Pair(WEIGHT, "as it is"), "use_cache": False}
    got = zoext.repeat(batch, copies)
    assert list(got) == list(batch)
    assert_copies(got["a"], TOKENS, copies)
    assert_copies(got["b"][0], MASK, copies)
    assert_copies(got["b"][1][0], WEIGHT, copies)
    assert got["b"][1][1] is None
    assert isinstance(got["c"], Pair)
    assert_copies(got["c"].x, WEIGHT, copies)
    assert got["c"].y == "as it is"
    assert got["use_cache"] is False
    assert batch["a"] is TOKENS
    assert batch["b"][0] is MASK


def test_containers_keep_their_class() -> None:
    encoding = BatchEncoding({"input_ids": TOKENS, "texts": ["one", "two"]})
    got = zoext.repeat(encoding, 2)
    assert type(got) is BatchEncoding
    assert_copies(got["input_ids"], TOKENS, 2)
    assert got["texts"] == ["one", "two"]
    assert encoding["input_ids"] is TOKENS
    output = zoext.repeat(BaseModelOutput(last_hidden_state=WEIGHT), 3)
    assert type(output) is BaseModelOutput
    assert_copies(output.last_hidden_state, WEIGHT, 3)
    record = zoext.repeat(Record(TOKENS, "a name"), 2)
    assert_copies(record.tokens, TOKENS, 2)
    assert record.name == "a name"
    assert type(zoext.repeat(OrderedDict(a=TOKENS), 2)) is OrderedDict
    assert_copies(zoext.repeat(MappingProxyType({"a": TOKENS}), 2)["a"], TOKENS, 2)
    assert_copies(zoext.repeat(TOKENS[:, :0], 2), TOKENS[:, :0], 2)
    assert zoext.repeat((), 2) == ()


def test_one_copy_is_the_batch_itself() -> None:
    batch = {"a": torch.tensor(3.0), "b": object()}
    assert zoext.repeat(batch, 1) is batch


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"a": [TOKENS, torch.tensor(1.0)]}, ValueError, r"batch\['a'\]\[1\] is a tensor without dimensions"),
        (
            {"a": TOKENS, "b": Pair(1, torch.ones(1, 3))},
            ValueError,
            r"batch\['b'\]\.y has 1 rows, but batch\['a'\] has 5",
        ),
        (BatchEncoding({"a": TOKENS, "b": WEIGHT[1:]}), ValueError, r"batch\['b'\] has 4 rows"),
        ({"past_key_values": DynamicCache()}, TypeError, r"batch\['past_key_values'\] is a cache of keys"),
        ({"a": np.ones(5)}, TypeError, r"batch\['a'\] is a numpy.ndarray, .*; use a tensor"),
        ({"a": {"b": {TOKENS}}}, TypeError, r"batch\['a'\]\['b'\] is a builtins.set"),
        ([TOKENS.to_sparse()], ValueError, r"batch\[0\] is not a dense tensor"),
        (Record(torch.tensor(0), ""), ValueError, r"batch\.tokens is a tensor without dimensions"),
    ],
)
def test_what_cannot_be_repeated_is_named(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        zoext.repeat(batch, 2)


@pytest.mark.parametrize("copies", [0, -1, True, 2.0, None])
def test_copies_must_be_a_count(copies: Any) -> None:
    for function in (zoext.repeat, zoext.mean_per_copy):
        with pytest.raises(ValueError, match="copies must be an integer of at least 1"):
            function(TOKENS, copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (7,), (7, 2)])
def test_means_are_those_of_each_copy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    losses = (torch.randn(3 * 5, *shape, generator=generator) * 9).to(dtype)
    weights = torch.rand(15, *shape, generator=generator)
    wide = losses.to(torch.promote_types(dtype, torch.float32))
    means = torch.stack([block.mean() for block in blocks(wide, 3)])
    weighted = torch.stack(
        [(a * b).sum() / b.sum() for a, b in zip(blocks(wide, 3), blocks(weights, 3), strict=True)]
    )
    torch.testing.assert_close(zoext.mean_per_copy(losses, 3), means)
    torch.testing.assert_close(zoext.mean_per_copy(losses, 3, weights), weighted.to(wide.dtype))
    one = zoext.mean_per_copy(losses, 3, weights[:5])
    torch.testing.assert_close(one, zoext.mean_per_copy(losses, 3, torch.cat([weights[:5]] * 3)))


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda x: np.array(x, np.float32)])
def test_numbers_of_reward_functions_are_averaged(kind: Any) -> None:
    numbers, mask = [0.5, 1.5, 2.0, 4.0, 1.0, -1.0], [True, False, True]
    want = torch.tensor([4 / 3, 4 / 3])
    torch.testing.assert_close(zoext.mean_per_copy(kind(numbers), 2), want, check_dtype=False)
    got = zoext.mean_per_copy(kind(numbers), 2, kind(mask))
    torch.testing.assert_close(got, torch.tensor([1.25, 1.5]), check_dtype=False)


@pytest.mark.parametrize("values", ["many", [1.0, None], iter([1.0, 2.0]), [torch.ones(2), torch.ones(3)]])
def test_what_is_no_number_is_refused(values: Any) -> None:
    with pytest.raises(TypeError, match="losses must be a tensor, or a list or an array of numbers, not "):
        zoext.mean_per_copy(values, 2)
    with pytest.raises(TypeError, match="weights must be a tensor, or a list or an array of numbers, not "):
        zoext.mean_per_copy([1.0, 2.0], 2, values)


def test_masked_losses_are_left_out() -> None:
    losses = torch.tensor([[1.0, torch.nan], [5.0, 2.0], [4.0, torch.inf], [torch.nan, 1.0]])
    mask = torch.tensor([[True, False], [True, True]])
    torch.testing.assert_close(
        zoext.mean_per_copy(losses, 2, mask), torch.tensor([8 / 3, torch.nan]), equal_nan=True
    )
    nothing = zoext.mean_per_copy(losses, 2, torch.zeros(4, 2))
    assert nothing.isnan().all()


def test_losses_that_copies_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"that copies=2 divides, not the shape \[5\]; return the losses of"):
        zoext.mean_per_copy(WEIGHT, 2)
    with pytest.raises(ValueError, match=r"not the shape \[\]"):
        zoext.mean_per_copy(WEIGHT.mean(), 1)
    with pytest.raises(
        ValueError, match=r"weights must have .* \[6, 2\], or of one copy's, \[3, 2\], not \[6\]"
    ):
        zoext.mean_per_copy(torch.ones(6, 2), 2, torch.ones(6))
