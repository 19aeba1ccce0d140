"""Data-parallel ranks: they train the same weights on different batches."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

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

    def first(self, frame: Frame, finite: Tensor) -> tuple[Frame, Tensor]:
        """The frame of the first rank, and whether the activations behind it were finite."""
        group = self.group
        if group is None:
            return frame, finite
        sides = [dict(sorted(side.items())) for side in (frame.left, frame.right)]
        factors = [factor for side in sides for factor in side.values()]
        flat = [moved(factor.flatten(), finite.device) for factor in factors]
        sent = torch.cat([*flat, finite.float().view(1)])
        dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
        parts = iter(sent[:-1].split([factor.numel() for factor in factors]))
        left, right = (
            {key: moved(next(parts).view_as(old), old.device) for key, old in side.items()} for side in sides
        )
        return Frame(left, right), sent[-1] != 0

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
