"""Data-parallel ranks: they train the same weights on different batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zoext._engine import digests
from zoext._parameters.parameters import Parameters
from zoext._runtime.devices import moved, widest
from zoext._runtime.late_reads import LateReads
from zoext.directions import Frame

#: Steps from one comparison of the replicas to the next.
COMPARED_EVERY = 100

#: Bits of a digest whose square, added up over ranks, is exact.
_MASKS = {torch.float64: 2**20 - 1, torch.float32: 2**8 - 1}

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
        self._digest: Tensor | None = None  # of weights and options, if they are compared at this step
        self._step = 0
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

    def mean(self, losses: Tensor, seeds: Tensor) -> Tensor:
        """The losses of a round, [P], averaged over ranks. Equal float32 losses keep their bits.

        ``seeds`` are those of the step. What identifies the step, and the weights if they are compared at
        this step, is added up in the same collective as the losses.
        """
        group = self.group
        if group is None:
            return losses
        dtype = widest(losses.device)
        own = torch.stack(
            (seeds[0], self._digest if self._digest is not None else torch.zeros_like(seeds[0]))
        )
        own = own.bitwise_and(_MASKS[dtype]).to(dtype)
        # Sums of values and of their squares are those of equal values only if all are equal.
        own = torch.cat((own, own * own))
        total = torch.cat((losses.to(dtype), own))
        dist.all_reduce(total, group=group)
        count = dist.get_world_size(group)
        differs = total[len(losses) :] != count * own
        self._differing.send(torch.stack((differs[::2].any(), differs[1::2].any())))
        if losses.device.type == "cpu":
            self.raise_if_differing()
        return (total[: len(losses)] / count).to(losses.dtype)

    @property
    def receives(self) -> bool:
        """Whether frames come from another rank."""
        group = self.group
        return group is not None and dist.get_rank(group) > 0

    def first(
        self, found: tuple[Frame, Tensor] | None, keys: Sequence[int], device: torch.device
    ) -> tuple[Frame, Tensor]:
        """The frame of the first rank, and whether the activations behind it were finite.

        Args:
            found: those of this rank; other ranks than the first may have none.
            keys: those of all parameters that move. Ranks see different batches, so that other weights may
                be unused on the first one: which have factors is sent before them, and read on the host.
            device: where the losses are.
        """
        group = self.group
        frame, finite = found or (Frame(), torch.ones((), dtype=torch.bool, device=device))
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
        kind = _KINDS.index("unused")
        pairs = zip(keys, self._layouts, strict=True)
        unused = frozenset(key for key, layout in pairs if layout.kind == kind)
        return Frame(sides["left"], sides["right"], unused), sent[-1] != 0

    def begin(
        self, groups: Sequence[Parameters], options: Sequence[Mapping[str, Any]], device: torch.device
    ) -> None:
        """Prepares the comparison of the ranks, before the first round of an estimate.

        Weights are compared every ``COMPARED_EVERY`` steps: a condition that all ranks of a step share.

        Raises:
            RuntimeError: if the last step found a rank that differs.
        """
        self.raise_if_differing()
        step = options[0]["step"]
        if self.group is None or step % COMPARED_EVERY:
            self._digest = None
        elif self._digest is None or step != self._step:
            self._digest = digests.of_weights(groups, device) + digests.of_options(options)
        self._step = step

    def raise_if_differing(self) -> None:
        """Raises a RuntimeError that names a rank, if a comparison found one; all ranks find it alike."""
        for steps_differ, weights_differ in self._differing.take():
            if steps_differ:
                raise RuntimeError(
                    "process_group: ranks are at different steps or have different seeds (this one is at "
                    f"step {self._step}), so their losses do not belong together. Have all ranks call step() "
                    "or estimate() equally often, also after an exception, and give them the same seed"
                )
            if weights_differ:
                raise RuntimeError(
                    f"process_group: rank {self._odd_rank()} has other weights or options (recipe, lr, mu, "
                    f"weight_decay) than rank 0 at step {self._step}. Give all ranks the same before the "
                    "first step, after the model is wrapped or loaded; or pass process_group=None if they "
                    "train different models"
                )

    def _odd_rank(self) -> int:
        group, digest = self.group, self._digest
        assert group is not None
        assert digest is not None
        rows = digest.new_zeros(dist.get_world_size(group))
        rows[dist.get_rank(group)] = digest
        dist.all_reduce(rows, group=group)
        return int((rows != rows[0]).nonzero()[0])
