"""The labelled tokens of a batch, and their hidden states as rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zoext.losses._refusals import CompactLossError


@dataclass(frozen=True)
class Rows:
    """The labelled tokens of each copy of a batch, at the same positions.

    Attributes:
        index: int64 [R]: positions in the flattened labels of one copy, all different.
        targets: int64 [C, R]: their labels; ``ignore_index`` for those that do not count.
        overflow: float32 []: NaN if the batch has more labels than R, and else 0; None if R is their number.
        shape: of the labels, [C B, T].
        shift: how many positions before its label a token is predicted.
    """

    index: Tensor
    targets: Tensor
    overflow: Tensor | None
    shape: torch.Size
    shift: int

    def of(self, hidden: Tensor) -> Tensor:
        """The hidden states [C, R, d] that predict the labels."""
        if hidden.dim() != 3 or hidden.shape[:2] != self.shape:
            raise CompactLossError(
                f"the model made hidden states of shape {list(hidden.shape)} for labels of shape "
                f"{list(self.shape)}, so they do not belong to the same tokens; use the loss of the model"
            )
        index = (self.index - self.shift).clamp_min(0)
        return hidden.reshape(len(self.targets), -1, hidden.shape[2])[:, index]

    def spread(self, losses: Tensor) -> Tensor:
        """Losses [C, R] at the positions of their labels, [C B, T]; 0 elsewhere."""
        flat = losses.new_zeros(len(losses), self.shape.numel() // len(losses))
        return flat.index_copy(1, self.index, losses).reshape(self.shape)


class RowFinder:
    """Finds the labelled tokens.

    Args:
        shift: 1 if a token is predicted from the one before, and else 0.
        ignore_index: the label of tokens that do not count.
        rows: the number R of rows per copy; None: as many as there are labels, which is only known to the
            host, so that a device has to be waited for. Then the rows of the last labels are kept.
    """

    def __init__(self, shift: int, ignore_index: int, rows: int | None) -> None:
        self._shift = shift
        self._ignore_index = ignore_index
        self._rows = rows
        self._found: Any = WeakTensorKeyDictionary()  # by labels on a device: their version, copies and rows

    def find(self, labels: Any, copies: int, name: str = "labels") -> Rows:
        """The rows of labels [C B, T], an entry of the batch of this name."""
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[0] % copies:
            shown = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"batch[{name!r}] must be a tensor [{'' if copies == 1 else f'{copies} * '}B, T], not {shown}"
            )
        if labels.is_cpu or labels.is_inference() or self._rows is not None:
            return self._find(labels, copies)
        # The memory of a device, unlike that of the host, changes by functions of torch only.
        key = labels._version, copies
        known, rows = self._found.get(labels, (None, None))
        if known != key:
            rows = self._find(labels, copies)
            self._found[labels] = key, rows
        return rows  # type: ignore[no-any-return]

    def _find(self, labels: Tensor, copies: int) -> Rows:
        flat = labels.reshape(copies, -1)
        counts = labels != self._ignore_index
        if self._shift:
            counts[:, 0] = False  # which nothing predicts
        counts = counts.reshape(copies, -1)
        if labels.is_cpu and copies > 1 and not torch.equal(counts, counts[:1].expand_as(counts)):
            raise ValueError(
                f"batch['labels']: the {copies} copies have labels at different positions; repeat one batch "
                "with zoext.repeat"
            )
        if self._rows is None:
            index, overflow = _nonzero(counts[0]), None
        else:
            index, overflow = self._static(counts[0], self._rows)
        targets = torch.where(counts[:, index], flat[:, index], self._ignore_index)
        return Rows(index, targets, overflow, labels.shape, self._shift)

    @staticmethod
    def _static(counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The first ``rows`` positions that count, and then others, without waiting for the device."""
        index = (~counts).to(torch.uint8).argsort(stable=True)[:rows]
        too_many = counts.sum() > rows
        if counts.is_cpu and bool(too_many):
            raise ValueError(
                f"rows={rows}, but the batch has {int(counts.sum())} labels; give the largest number that a "
                "batch has"
            )
        return index, torch.where(too_many, math.nan, 0.0)


def _nonzero(counts: Tensor) -> Tensor:
    if counts.is_cuda and torch.cuda.is_current_stream_capturing():
        raise CompactLossError(
            "the number of labels is only known to the device while a CUDA graph is captured; give "
            "CompactLoss the largest number that a batch has, CompactLoss(model, rows=...)"
        )
    return counts.nonzero().squeeze(1)
