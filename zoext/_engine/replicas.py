"""Data-parallel ranks: they train the same weights on different batches."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zoext._parameters.parameters import Parameters
from zoext._runtime.devices import moved, widest
from zoext._runtime.late_reads import LateReads
from zoext.directions import Frame

#: Steps from one comparison of the replicas to the next.
COMPARED_EVERY = 100

_CHECKED = ("weights", "options (recipe, seed, step, lr, mu or weight_decay)")


_KINDS = ("dense", "still", "left", "right")


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


class Replicas:
    """The ranks whose losses are averaged, so that all of them move their weights alike.

    A round of P probes takes one collective of P numbers. Weights are never sent. Directions that depend on
    activations are those of the first rank.

    Args:
        group: "auto" for the default process group, if there is one when a step begins; None for no other
            ranks; or a process group.
    """

    def __init__(self, group: dist.ProcessGroup | str | None) -> None:
        is_group = dist.is_available() and isinstance(group, dist.ProcessGroup)
        outside: object = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None
        if group is not None and group == outside:
            raise ValueError("process_group: this rank is not one of its ranks; pass the group that it is in")
        if not (group is None or group == "auto" or is_group):
            raise TypeError(f"process_group must be 'auto', None or a ProcessGroup, not {group!r}")
        self._given = group
        self._differing = LateReads()
        self._compared: int | None = None
        self._layouts: list[_Layout] = []  # of the first rank's last frame, by parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return Replicas(self._given)  # a process group cannot be copied

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks of this step; None if there is no other."""
        group = self._given
        if group == "auto":
            group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if group is None or dist.get_world_size(group) == 1:  # type: ignore[arg-type]
            return None
        return group  # type: ignore[return-value]

    def mean(self, losses: Tensor) -> Tensor:
        """The losses of a round, [P], averaged over ranks. Equal losses stay what they are, to the bit."""
        group = self.group
        if group is None:
            return losses
        total = losses.to(widest(losses.device), copy=True)
        dist.all_reduce(total, group=group)
        return (total / dist.get_world_size(group)).to(losses.dtype)

    def first(self, frame: Frame, finite: Tensor, keys: Sequence[int]) -> tuple[Frame, Tensor]:
        """The frame of the first rank, and whether the activations behind it were finite.

        ``keys`` are those of all parameters that move. Ranks see different batches, so that other weights may
        rest on the first one: which have factors is sent before the factors, and read on the host.
        """
        group = self.group
        if group is None:
            return frame, finite
        source = dist.get_global_rank(group, 0)
        if not (finite.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph keeps what it was
            table = torch.tensor([_Layout.of(frame, key) for key in keys], device=finite.device)
            dist.broadcast(table, source, group=group)
            self._layouts = [_Layout(*row) for row in table.tolist()]
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
        sides: dict[str, dict[int, Tensor]] = {"left": {}, "right": {}}
        for key, layout, part in zip(keys, self._layouts, sent[:-1].split(sizes), strict=True):
            if layout.side:
                sides[layout.side][key] = part.view(layout.shape)
        rests = _KINDS.index("still")
        pairs = zip(keys, self._layouts, strict=True)
        still = frozenset(key for key, layout in pairs if layout.kind == rests)
        return Frame(sides["left"], sides["right"], still), sent[-1] != 0

    def compare(
        self, groups: Sequence[Parameters], options: Sequence[Mapping[str, Any]], device: torch.device
    ) -> None:
        """Compares a digest of the weights over ranks, at the first step and every ``COMPARED_EVERY`` steps.

        Raises:
            RuntimeError: naming a rank that differs; except on the CPU, when the next step begins.
        """
        self._raise_if_differing()
        group, step = self.group, options[0]["step"]
        if group is None or step == self._compared:
            return
        if self._compared is not None and step % COMPARED_EVERY:
            return
        self._compared = step
        row = torch.stack((_weights_digest(groups, device), _options_digest(options, device)))
        rows = row.new_zeros(dist.get_world_size(group), len(row))
        rows[dist.get_rank(group)] = row
        dist.all_reduce(rows, group=group)
        self._differing.send(rows != rows[0])
        if device.type == "cpu":
            self._raise_if_differing()

    def _raise_if_differing(self) -> None:
        for rows in self._differing.take():
            for rank, row in enumerate(rows):
                if any(row):
                    what = " and ".join(name for name, differs in zip(_CHECKED, row, strict=True) if differs)
                    raise RuntimeError(
                        f"replicas: rank {rank} of the process group has other {what} than rank 0 at step "
                        f"{self._compared}. Give all ranks the same weights (after the model is wrapped or "
                        "loaded), seed and options before the first step, or pass process_group=None if "
                        "they train different models"
                    )


def _weights_digest(groups: Sequence[Parameters], device: torch.device) -> Tensor:
    """int64 []: a sum over the bits of all weights, each tensor with a factor of its own."""
    tensors = [tensor for group in groups for tensor in group.tensors]
    sums = torch.stack([moved(_bits(tensor).sum(dtype=torch.int64), device) for tensor in tensors])
    return (sums * (2 * torch.arange(len(sums), device=device) + 1)).sum()


def _bits(tensor: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(kinds[tensor.element_size()])


def _options_digest(options: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
    """int64 []; learning rates that are tensors are left out, since reading them may wait for the device."""
    first = options[0]
    text = repr([first[name] for name in ("recipe", "precision", "seed", "step")])
    numbers = [
        float(group[name])
        for group in options
        for name in ("lr", "mu", "weight_decay")
        if not isinstance(group[name], Tensor)
    ]
    return torch.tensor(zlib.crc32(text.encode() + struct.pack(f"<{len(numbers)}d", *numbers)), device=device)
