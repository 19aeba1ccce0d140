"""Has FSDP2 gather displaced weights, from shards that keep their bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from zoext._parameters.gathering import GatherGroup, Shard, groups_of
from zoext._parameters.parameters import Parameters
from zoext._runtime.interrupts import Signals
from zoext._runtime.profiling import Phase, record
from zoext.probes._owners import Owners
from zoext.probes._scratch import Scratch, bytes_of, empty_like

#: Fills tensors with displaced parameters, of the parameter group with this number.
Fill = Callable[[Sequence[Tensor], Parameters, int], None]


class GatherSwap:
    """Displaces shards whenever FSDP2 is about to gather them.

    A rank writes its displaced shards to scratch memory and lets FSDP2 read these in their place, so that
    every rank generates the noise of its own shards only, in their dtype. Modules then run with displaced
    weights until these are freed, which happens at the end of a probe at the latest.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._signals = Signals()
        self._groups: list[GatherGroup] = []
        self._shards: dict[int, Shard] = {}  # by the ids of the parameters
        self._moving: dict[GatherGroup, list[tuple[int, Parameters]]] = {}
        self._fill: Fill | None = None  # while a probe runs
        self._held: list[tuple[Shard, Tensor]] = []  # displaced until the probe ends, and their originals

    @property
    def managed(self) -> Collection[int]:
        """The ids of the parameters that FSDP2 gathers."""
        return self._shards.keys()

    @contextmanager
    def hooked(self, modules: Sequence[nn.Module], signals: Signals) -> Iterator[None]:
        """A block in which the groups of ``modules`` gather displaced shards while a probe runs."""
        self._signals = signals
        self._groups = groups_of(modules)
        self._shards = {id(shard.parameter): shard for group in self._groups for shard in group.shards}
        self._moving = {}
        with ExitStack() as stack:
            for group in self._groups:
                stack.enter_context(group.intercepted(self._displaces))
            self.free()  # what was gathered at theta
            yield

    def free(self) -> None:
        """Frees what is gathered."""
        for group in self._groups:
            group.free()

    def begin(self, fill: Fill, owners: Owners) -> None:
        """Begins a probe that moves the parameters of ``owners``."""
        self._fill = fill
        if not self._moving:
            self._moving = {
                group: owners.take([id(shard.parameter) for shard in group.shards]) for group in self._groups
            }

    def end(self) -> None:
        """Ends a probe, so that theta is gathered next."""
        self._fill = None
        for shard, original in self._held:
            shard.gathered = original
        self._held = []
        self.free()

    def largest(self) -> Counter[torch.device]:
        """The bytes of the largest group on each device."""
        largest: Counter[torch.device] = Counter()
        for moving in self._moving.values():
            shards = [self._shards[id(owner)] for _, part in moving for owner in part.owners]
            largest |= bytes_of(shard.gathered for shard in shards)
        return largest

    def hold(self, parameter: Tensor, like: Tensor) -> Tensor:
        """Memory for the displaced values of a part, which is gathered in its place until the probe ends."""
        shard = self._shards[id(parameter)]
        self._held.append((shard, shard.gathered))
        shard.gathered = empty_like(shard.gathered)
        return _begin_of(shard.gathered, like)

    def _displaces(self, group: GatherGroup) -> AbstractContextManager[None] | None:
        fill, moving = self._fill, self._moving.get(group)
        return self._displaced(fill, moving) if fill is not None and moving else None

    @contextmanager
    def _displaced(self, fill: Fill, moving: list[tuple[int, Parameters]]) -> Iterator[None]:
        """A block in which shards are replaced with displaced ones; theirs are in memory until it ends."""
        held = {id(shard.parameter) for shard, _ in self._held}
        originals: list[tuple[Shard, Tensor]] = []
        with self._signals.held(), torch.no_grad():
            top = self._scratch.top
            try:
                for number, parameters in moving:
                    fresh = [i for i, owner in enumerate(parameters.owners) if id(owner) not in held]
                    if not fresh:
                        continue
                    own = parameters if len(fresh) == len(parameters) else parameters.take(fresh)
                    shards = [self._shards[id(owner)] for owner in own.owners]
                    displaced = self._scratch.take([shard.gathered for shard in shards])
                    with record(Phase.PERTURB):
                        fill(list(map(_begin_of, displaced, own.tensors)), own, number)
                    for shard, vector in zip(shards, displaced, strict=True):
                        originals.append((shard, shard.gathered))
                        shard.gathered = vector
                yield
            finally:
                for shard, original in originals:
                    shard.gathered = original
                self._scratch.release(top)


def _begin_of(vector: Tensor, like: Tensor) -> Tensor:
    """The part of a parameter in what is gathered; padding follows it."""
    return vector[: like.numel()].view(like.shape)
