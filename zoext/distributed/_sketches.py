"""Finds the frame of a step from activations on all ranks, of which each has those of its own batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zoext.directions import Frame, Observer, kind_of

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed import ProcessGroup

_USES = ("left", "right", "other")
#: Numbers that are gathered at once, from all ranks together: 64 MiB.
_AT_ONCE = 2**24


class _Piece(NamedTuple):
    """The sketch of this rank for a factor."""

    key: int
    side: str
    sketch: Tensor


class SketchExchange:
    """Gathers sketches from the ranks of a group, and keeps their layout for captured steps.

    A weight counts as used in each way in which a rank with data used it. All ranks merge the same sketches
    in the order of the ranks, so that they find the same bits, whichever arrives first.
    """

    def __init__(self) -> None:
        self._kinds: dict[int, str] = {}  # by key

    def frame(
        self, observer: Observer, has_seen: bool, counts: Tensor, group: ProcessGroup
    ) -> tuple[Frame, Tensor] | None:
        """The frame, and whether the activations behind it were finite; None if no rank has seen any.

        Args:
            observer: of this rank.
            has_seen: whether its forward has run.
            counts: whether the batch of this rank counts, bool [].
            group: the ranks.
        """
        if not has_seen:
            counts = torch.zeros_like(counts)
        if not (counts.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph keeps what it was
            kinds = _kinds_of(observer, has_seen, counts, group)
            if kinds is None:
                return None
            self._kinds = kinds
        sides: dict[str, dict[int, Tensor]] = {"left": {}, "right": {}}
        own_finite, finite = observer.finite, []
        for pieces in _portions(observer, self._kinds, dist.get_world_size(group)):
            sketches, is_finite = _gathered(pieces, own_finite, counts, group)
            finite.append(is_finite)
            for piece, parts in zip(pieces, sketches, strict=True):
                sides[piece.side][piece.key], is_finite = observer.merged(parts)
                finite.append(is_finite)
        unused = frozenset(key for key, kind in self._kinds.items() if kind == "unused")
        return Frame(sides["left"], sides["right"], unused), torch.stack(finite).all()


def _kinds_of(
    observer: Observer, has_seen: bool, counts: Tensor, group: ProcessGroup
) -> dict[int, str] | None:
    """The kinds of the directions of weights, by how all ranks used them, which the host waits for."""
    uses = observer.uses
    own = [[int(use in each) for use in _USES] for each in uses.values()]
    table = torch.tensor([*own, [int(has_seen)] * len(_USES)], dtype=torch.int32, device=counts.device)
    table[:-1] *= counts
    dist.all_reduce(table, dist.ReduceOp.MAX, group=group)
    *rows, (has_any_seen, *_) = table.tolist()
    if not has_any_seen:
        return None
    return {
        key: kind_of({use for use, flag in zip(_USES, row, strict=True) if flag})
        for key, row in zip(uses, rows, strict=True)
    }


def _portions(observer: Observer, kinds: dict[int, str], count: int) -> Iterator[Sequence[_Piece]]:
    """The sketches of all factors, in portions that ``count`` ranks gather at once; one at least."""
    portion: list[_Piece] = []
    size = 0
    for key, kind in kinds.items():
        if kind not in {"left", "right"}:
            continue
        piece = _Piece(key, kind, observer.sketch(key, kind))
        if portion and (size + piece.sketch.numel()) * count > _AT_ONCE:
            yield portion
            portion, size = [], 0
        portion.append(piece)
        size += piece.sketch.numel()
    yield portion


def _gathered(
    pieces: Sequence[_Piece], finite: Tensor, counts: Tensor, group: ProcessGroup
) -> tuple[list[Tensor], Tensor]:
    """The sketches of all ranks, [ranks, ...] each, and whether ``finite`` holds on all ranks that count."""
    flat = torch.cat([*(piece.sketch.flatten() for piece in pieces), finite.float().view(1)])
    neutral = torch.zeros_like(flat)
    neutral[-1] = 1
    own = torch.where(counts, flat, neutral)
    table = own.new_empty((dist.get_world_size(group), len(own)))
    dist.all_gather(list(table.unbind()), own, group=group)
    *parts, flags = table.split([*(piece.sketch.numel() for piece in pieces), 1], dim=1)
    sketches = [part.unflatten(1, piece.sketch.shape) for part, piece in zip(parts, pieces, strict=True)]
    return sketches, (flags != 0).all()
