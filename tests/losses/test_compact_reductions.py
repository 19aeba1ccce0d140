"""Losses of copies, examples and tokens belong to the right ones, and the head gets rows copy by copy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import zoext
from support.tiny_language_models import ragged, tiny

NAMES = ["Llama", "BERT", "T5"]


def tokens_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of each label, from all logits."""
    with torch.no_grad():
        logits = model(**batch).logits
    labels, causal = batch["labels"], "Causal" in type(model).__name__
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return torch.nn.functional.pad(losses, (1, 0)) if causal else losses


def counted(model: Any, labels: Tensor) -> Tensor:
    mask = labels != -100
    if "Causal" in type(model).__name__:
        mask[:, 0] = False
    return mask


@pytest.mark.parametrize("rows", [None, 19, 500])
@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_losses_of_tokens_and_examples(name: str, chunk: int | None, rows: int | None) -> None:
    model, batch = tiny(name), ragged()
    loss = zoext.CompactLoss(model, chunk=chunk, rows=rows)
    want, mask = tokens_of(model, batch), counted(model, batch["labels"])
    torch.testing.assert_close(loss.per_token(batch), want)
    torch.testing.assert_close(loss.per_example(batch), want.sum(1) / mask.sum(1))
    torch.testing.assert_close(loss(batch), want.sum() / mask.sum())


@pytest.mark.parametrize("rows", [None, 25])
@pytest.mark.parametrize("chunk", [None, 1, 8])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_losses_of_copies(name: str, chunk: int | None, rows: int | None) -> None:
    """The copies differ in their tokens, as those of probes differ in their weights."""
    model, one, other = tiny(name), ragged(), ragged()
    other["input_ids"] = 100 - other["input_ids"]
    both = {key: torch.cat([one[key], other[key]]) for key in one}
    loss = zoext.CompactLoss(model, chunk=chunk, rows=rows)
    got = loss(both, copies=2)
    assert got.shape == (2,)
    torch.testing.assert_close(got, torch.stack([model(**one).loss, model(**other).loss]))
    assert got[0] != got[1]
    per_token = loss.per_token(both, 2)
    torch.testing.assert_close(per_token, torch.cat([tokens_of(model, one), tokens_of(model, other)]))
    mask = counted(model, one["labels"])
    torch.testing.assert_close(zoext.mean_per_copy(per_token, 2, mask), got)
    torch.testing.assert_close(
        loss.per_example(both, 2), torch.cat([loss.per_example(one), loss.per_example(other)])
    )
    assert loss(one, copies=1).shape == (1,)
    torch.testing.assert_close(loss(both, copies=2, num_items_in_batch=9), got * mask.sum() / 9)


@pytest.mark.parametrize("chunk", [None, 1, 7, 12])
@torch.no_grad()
def test_head_gets_rows_copy_by_copy(chunk: int | None) -> None:
    model, batch = tiny("Llama, tied"), ragged()
    loss = zoext.CompactLoss(model, chunk=chunk)
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss(zoext.repeat(batch, 3), copies=3)
    labels = int(counted(model, batch["labels"]).sum())
    assert sum(map(len, seen)) == 3 * labels
    assert all(rows.dim() == 2 and rows.is_contiguous() and len(rows) % 3 == 0 for rows in seen)
    assert all(len(rows) <= max(chunk or math.inf, 3) for rows in seen)
    for rows in seen:
        first, *others = rows.chunk(3)
        for block in others:
            torch.testing.assert_close(block, first)


@torch.no_grad()
def test_example_without_a_label_is_nan_and_alone() -> None:
    model, batch = tiny("Llama"), ragged()
    batch["labels"][1] = -100
    got = zoext.CompactLoss(model).per_example(batch)
    assert got.isnan().tolist() == [False, True, False]


@torch.no_grad()
def test_labels_written_in_place_are_read_again() -> None:
    model, batch = tiny("Llama"), ragged()
    loss = zoext.CompactLoss(model)
    before = loss(batch)
    batch["labels"][:, 5] = -100
    torch.testing.assert_close(loss(batch), model(**batch).loss)
    assert loss(batch) != before
