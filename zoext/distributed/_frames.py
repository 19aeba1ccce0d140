"""Sends the frame of a step, its factors that depend on activations, to the ranks that share its batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zoext._runtime.devices import moved
from zoext.directions import Frame

_KINDS = ("dense", "unused", "left", "right")


class _Layout(NamedTuple):
    """The directions of a parameter in a frame: their kind, and the shape of its factor if it has one."""

    kind: int
    entries: int = 0  # of a stack of matrices; 0 if the parameter is a matrix
    rank: int = 0
    length: int = 0

    @classmethod
    def of(cls, frame: Frame, key: int) -> _Layout:
        kind = frame.kind(key)
        if kind not in {"left", "right"}:
            return cls(_KINDS.index(kind))
        factor = (frame.left if kind == "left" else frame.right)[key]
        return cls(_KINDS.index(kind), *((0,) * (3 - factor.dim())), *factor.shape)

    @property
    def side(self) -> str | None:
        """The side of its factor; None if it has none."""
        kind = _KINDS[self.kind]
        return kind if kind in {"left", "right"} else None

    @property
    def shape(self) -> tuple[int, ...]:
        stack = (self.entries,) if self.entries else ()
        return (*stack, self.rank, self.length)


class FrameBroadcast:
    """Sends frames to the ranks of a group, which keep the layout of the last one for captured steps."""

    def __init__(self) -> None:
        self._layouts: list[_Layout] = []  # by parameter

    def first(
        self,
        found: tuple[Frame, Tensor] | None,
        keys: Sequence[int],
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> tuple[Frame, Tensor] | None:
        """The frame of the first rank of ``group``, and whether the activations behind it were finite.

        None if the first rank has none.

        Args:
            found: those of this rank; other ranks than the first may have none.
            keys: those of all parameters that move. Which have factors depends on the forward of the first
                rank: this is sent before them, and read on the host.
            device: where the losses are.
            group: the ranks.
        """
        frame, finite = found or (Frame(), torch.ones((), dtype=torch.bool, device=device))
        source = dist.get_global_rank(group, 0)
        if not (finite.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph keeps what it was
            rows = [_Layout(int(found is not None)), *(_Layout.of(frame, key) for key in keys)]
            table = torch.tensor(rows, device=finite.device)
            dist.broadcast(table, source, group=group)
            (has_frame, *_), *layouts = table.tolist()
            if not has_frame:
                return None
            self._layouts = [_Layout(*row) for row in layouts]
        sizes = [prod(layout.shape) if layout.side else 0 for layout in self._layouts]
        if dist.get_rank(group) == 0:
            factors = {**frame.left, **frame.right}
            parts = [
                moved(factors[key].flatten(), finite.device)
                for key, size in zip(keys, sizes, strict=True)
                if size
            ]
            sent = torch.cat([*parts, finite.float().view(1)])
        else:
            sent = torch.empty(sum(sizes) + 1, dtype=torch.float32, device=finite.device)
        dist.broadcast(sent, source, group=group)
        return self._received(sent, keys, sizes)

    def _received(self, sent: Tensor, keys: Sequence[int], sizes: Sequence[int]) -> tuple[Frame, Tensor]:
        sides: dict[str, dict[int, Tensor]] = {"left": {}, "right": {}}
        for key, layout, part in zip(keys, self._layouts, sent[:-1].split(list(sizes)), strict=True):
            if layout.side:
                sides[layout.side][key] = part.view(layout.shape)
        kind = _KINDS.index("unused")
        pairs = zip(keys, self._layouts, strict=True)
        unused = frozenset(key for key, layout in pairs if layout.kind == kind)
        return Frame(sides["left"], sides["right"], unused), sent[-1] != 0
