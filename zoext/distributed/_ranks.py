"""The ranks that take the steps of a run together: with batches of their own, or with probes of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._runtime.devices import widest
from zoext._runtime.late_reads import LateReads
from zoext.directions import Frame, Observer
from zoext.distributed import _digests
from zoext.distributed._frames import FrameBroadcast
from zoext.distributed._groups import groups_of
from zoext.distributed._sharing import Losses, Share, Sharing
from zoext.distributed._sketches import SketchExchange
from zoext.distributed._sums import CheckedSum, Found, Identity
from zoext.estimators import stacked

if TYPE_CHECKING:  # a build of torch may lack them
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

#: What is compared, as in "rank 1 has other weights than rank 0".
_COMPARED = ("another recipe, seed or version", "other options (lr, mu, weight_decay)", "other weights")
#: The largest standard deviation, relative to the mean, of the losses of ranks with the same batch.
_NOISE = 1e-3


class Ranks(Sharing):
    """The ranks of a run.

    Data-parallel ranks have batches of their own, and the losses of each probe are averaged over them.
    Probe-parallel ranks have the same batch, and the probes of a round are dealt out over them. All ranks
    move their weights alike. A round takes one collective of a few numbers for each kind; weights are never
    sent. Directions that depend on activations follow from those of all batches.

    Args:
        process_group: the data-parallel ranks: "auto" for the default process group, if there is one when a
            step begins; None for no other ranks; a process group; or a ``DeviceMesh`` whose dimensions are
            named "data" and "probe".
        probe_group: the probe-parallel ranks; None if there are no others.
    """

    def __init__(
        self, process_group: ProcessGroup | DeviceMesh | str | None, probe_group: ProcessGroup | None = None
    ) -> None:
        self._groups = groups_of(process_group, probe_group)
        self._sums = {"probe_group": CheckedSum(), "process_group": CheckedSum()}
        self._sketches = SketchExchange()
        self._frames = FrameBroadcast()
        self._batches = LateReads()
        self._digests: Tensor | None = None  # int64 [3], as in ``_COMPARED``, if compared at this step
        self._has_failed = False  # whether this rank raised, and the others have yet to learn of it
        self._is_first = False  # whether the next round is the first of an estimate
        self._step = 0
        self._estimate, self._round = 0, 0  # of the step, and of the estimate
        self._looks = 0  # see ``begin``

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return Ranks(*self._groups)  # a process group cannot be copied

    def check(self, *, is_exact: bool, watches: bool) -> None:
        if self._groups.probes is not None and not is_exact:
            raise ValueError(
                "probe_group: probes in place restore weights up to rounding, which differs between ranks "
                "with other probes; pass the module and probe='streamed'"
            )

    @property
    def data(self) -> ProcessGroup | None:
        group = self._groups.data
        if group == "auto":
            is_there = self._groups.probes is None and dist.is_available() and dist.is_initialized()
            group = dist.group.WORLD if is_there else None
        return _of_several(group)

    @property
    def probes(self) -> ProcessGroup | None:
        return _of_several(self._groups.probes)

    @property
    def divides_probes(self) -> bool:
        return self.probes is not None

    @property
    def are_several(self) -> bool:
        return self.data is not None or self.probes is not None

    # A round

    def dealt(self, count: int) -> Sequence[int]:
        """See ``Sharing.dealt``.

        Every rank evaluates one at least, so that its random generators and running statistics move on. When
        ranks are compared, all of them evaluate the first, which shows whether they have the same batch.
        """
        share = self._share(count)
        if self.probes is None or (share and not self._compares_batches):
            return share
        return share if 0 in share else (0, *share)

    def _share(self, count: int) -> range:
        if (group := self.probes) is None:
            return range(count)
        return range(dist.get_rank(group), count, dist.get_world_size(group))

    @property
    def _compares_batches(self) -> bool:
        return self._is_first and self._digests is not None

    def exchanged(self, share: Share, seeds: Tensor) -> Losses:
        """The losses averaged over ranks. Equal float32 losses keep their bits.

        What identifies the step, and the weights if they are compared at this step, is added up in the same
        collective as the losses.
        """
        if share.is_whole:
            return self._told(share, seeds)
        first = next(iter(share.losses.values()))
        own, zero = self._share(share.size), torch.zeros_like(first)
        losses = stacked([share.losses[i] if i in own else zero for i in range(share.size)])
        return Losses(self._mean(losses, seeds, share.weight, first, None))

    def _told(self, share: Share, seeds: Tensor) -> Losses:
        missing = tuple(index for index in range(share.size) if index not in share.losses)
        if missing and self.data is not None:
            raise ValueError(
                "losses: None, for a loss that did not come back, is for one process that tells; the ranks "
                "of a process group must tell all losses"
            )
        gap = torch.full((), torch.nan, device=seeds.device)
        losses = stacked([share.losses.get(index, gap) for index in range(share.size)])
        return Losses(self._mean(losses, seeds, share.weight, None, None), missing, len(missing))

    def fail(self, count: int, seeds: Tensor, error: Exception, *, is_dealt: bool = True) -> Tensor | None:
        if not self.are_several:
            return None
        failed = CheckedSum.failure(dist.get_rank(), seeds.device)
        losses = torch.full((count,), torch.nan, dtype=failed.dtype, device=seeds.device)
        try:
            losses = self._mean(losses, seeds, None, losses[0] if is_dealt else None, failed)
            self._has_failed = True
            return losses
        except RuntimeError:  # as on the other ranks; the error of the closure says more
            return None

    def _mean(
        self,
        losses: Tensor,
        seeds: Tensor,
        weight: Tensor | None,
        first: Tensor | None,
        failed: Tensor | None,
    ) -> Tensor:
        data, probes = self.data, self.probes if first is not None else None
        if data is None and probes is None:
            return losses
        digest = torch.zeros_like(seeds[0]) if self._digests is None else self._digests.sum()
        # Also of the estimate and the round: a rank that was interrupted may begin a step again.
        at = seeds[0] + 7919 * (1009 * self._estimate + self._round) + 1000003 * self._looks
        self._round += 1
        kind = 2 * (losses.dtype == torch.float64) + (weight is not None)
        sums = losses.to(widest(losses.device))
        if probes is not None and first is not None:
            seen = first.to(sums.dtype).view(-1)[: self._compares_batches]
            values = torch.cat((sums, seen, seen * seen))
            found = self._sums["probe_group"].of(values, Identity(at, digest, kind), failed, probes)
            sums, failed, differs = found.values[: len(sums)], found.failed, found.differs
            if self._compares_batches:
                mean, square = found.values[len(sums) :] / dist.get_world_size(probes)
                has_other_batch = square - mean * mean > (_NOISE * mean) ** 2
                self._batches.send(has_other_batch)
                differs = differs | has_other_batch
            # Ranks with other batches must not take a step that these do not take.
            digest = digest + differs
        if data is not None:
            own = torch.ones_like(sums[:1]) if weight is None else weight.to(sums.dtype).view(1)
            weighed = torch.where(own == 0, torch.zeros_like(sums), sums * own)  # a rank without data has NaN
            values = torch.cat((weighed, own))
            found = self._sums["process_group"].of(values, Identity(at, digest, kind), failed, data)
            sums = found.values[:-1] / found.values[-1]
        self._is_first = False
        if losses.device.type == "cpu":
            self.raise_if_differing()
        return sums.to(losses.dtype)

    # The frame of a step

    @property
    def receives(self) -> bool:
        return self.data is not None or (self.probes is not None and dist.get_rank(self.probes) > 0)

    def frame(
        self,
        observer: Observer,
        has_seen: bool,
        keys: Sequence[int],
        device: torch.device,
        weight: Tensor | None = None,
    ) -> tuple[Frame, Tensor] | None:
        """Of the batches of all data-parallel ranks; probe-parallel ranks get that of the first of them."""
        if self.data is not None:
            counts = torch.ones((), dtype=torch.bool, device=device) if weight is None else weight != 0
            found = self._sketches.frame(observer, has_seen, counts, self.data)
        else:
            found = observer.frame() if has_seen else None
        if self.probes is not None:
            found = self._frames.first(found, keys, device, self.probes)
        return found

    # Whether the ranks belong together

    def begin(
        self,
        groups: Sequence[Parameters],
        options: Sequence[Mapping[str, Any]],
        device: torch.device,
        *,
        is_first: bool = True,
        looks: int = 0,
    ) -> None:
        """Prepares the comparison of the ranks, before the first round of an estimate.

        Weights are compared at some steps only: a condition that all ranks of a step share.

        Raises:
            RuntimeError: if the last step found a rank that differs.
            ValueError: if ranks that evaluate other probes have parts of the same parameter, or ranks that
                do not exchange losses.
        """
        if self._has_failed:  # this rank has raised its own error
            self._has_failed = False
            self._take()
        self.raise_if_differing()
        if self.probes is not None:
            _check_not_dealt_out(groups, dist.get_process_group_ranks(self.probes))
        _check_meshes(groups, self.data)
        step = options[0]["step"]
        if not self.are_several or step % _digests.COMPARED_EVERY:
            self._digests = None
        elif self._digests is None or step != self._step:
            numbers = torch.tensor([_digests.of_recipe(options), _digests.of_options(options)], device=device)
            self._digests = torch.cat((numbers, _digests.of_weights(groups, device).view(1)))
        self._estimate = 0 if is_first else self._estimate + 1
        self._step, self._round, self._is_first = step, 0, True
        self._looks = looks

    def raise_if_differing(self) -> None:
        """Raises a RuntimeError that names a rank, if a sum found one; all ranks of the sum find it alike."""
        found, has_other_batch = self._take()
        groups = {"probe_group": self.probes, "process_group": self.data}
        # All before any is raised: naming a rank takes a collective.
        errors = [self._error(name, groups[name], each) for name, each in found]
        if has_other_batch:
            errors.append(
                f"probe_group: ranks have different losses at the same weights at step {self._step}. Give "
                "all of them the same batch and the same random seed; other batches are for process_group"
            )
        if errors:
            raise RuntimeError(errors[0])

    def _take(self) -> tuple[list[tuple[str, Found]], bool]:
        """What the sums since the last call found, with the name of the group; and if batches differ."""
        found = [(name, each) for name, checked in self._sums.items() for each in checked.take()]
        return found, any(self._batches.take())

    def _error(self, name: str, group: ProcessGroup | None, found: Found) -> str:
        if found.steps_differ:
            return (
                f"{name}: ranks are at different steps or have different seeds (this one is at step "
                f"{self._step}), so their losses do not belong together. Have all ranks call step() or "
                "estimate() equally often, also after an exception, and give them the same seed. With "
                "defer=True, have all ranks call optimizer.merge() before one of them saves or evaluates "
                "alone, or load a checkpoint on all of them if one already has"
            )
        if found.failed:
            which = f"rank {found.failed_rank}" if found.failed == 1 else f"{found.failed} ranks"
            return (
                f"{name}: the closure of {which} raised at step {self._step}, or the step could not be "
                "recorded; see the error there. The step moved no weight"
            )
        if found.weights_differ:
            return (
                f"{name}: {self._odd_ranks(group)} at step {self._step}. Give all ranks the same before the "
                "first step, after the model is wrapped or loaded; or pass process_group=None if they train "
                "different models"
            )
        return (
            f"{name}: some ranks return (loss, weight) and others a loss alone, or losses of float64, as "
            f"Python floats are, and others of float32, at step {self._step}; return the same on all ranks"
        )

    def _odd_ranks(self, group: ProcessGroup | None) -> str:
        """Which ranks differ from most, or from the first one if no more are alike, and in what."""
        assert group is not None
        if self._digests is None:  # another group of some of these ranks found that its ranks differ
            return "some ranks have other weights, options or batches than others"
        rows = self._digests.new_zeros((dist.get_world_size(group), len(_COMPARED)))
        rows[dist.get_rank(group)] = self._digests
        dist.all_reduce(rows, group=group)
        found = [tuple(row) for row in rows.tolist()]
        expected = Counter(found).most_common(1)[0][0]
        odd = [rank for rank, row in enumerate(found) if row != expected]
        if not odd:
            return "a rank of another group of these ranks has other weights, options or batches"
        numbers = [dist.get_global_rank(group, rank) for rank in odd]
        ranks = ", ".join(map(str, numbers[:5])) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        columns = zip(_COMPARED, *(found[rank] for rank in (odd[0], found.index(expected))), strict=True)
        what = " and ".join(name for name, own, other in columns if own != other)
        has = f"rank {ranks} has" if len(odd) == 1 else f"ranks {ranks} have"
        return f"{has} {what} than rank {dist.get_global_rank(group, found.index(expected))}"


def _of_several(group: Any) -> ProcessGroup | None:
    if group is None or dist.get_world_size(group) == 1:
        return None
    return group  # type: ignore[no-any-return]


def _check_meshes(groups: Sequence[Parameters], data: ProcessGroup | None) -> None:
    """Raises for a DTensor with parts on ranks that do not exchange losses with this one."""
    connected = {dist.get_rank()} if data is None and dist.is_initialized() else set()
    connected = connected if data is None else set(dist.get_process_group_ranks(data))
    known: set[DeviceMesh] = set()
    for parameters in groups:
        for name, owner in zip(parameters.names, parameters.owners, strict=True):
            if not shards.is_distributed(owner) or owner.device_mesh in known:
                continue
            known.add(owner.device_mesh)
            if not connected.issuperset(owner.device_mesh.mesh.flatten().tolist()):
                raise ValueError(
                    f"process_group: ranks that hold parts of {name} do not exchange losses, so that these "
                    "parts would take different steps; pass process_group='auto', or a group with all ranks "
                    "of its mesh"
                )


def _check_not_dealt_out(groups: Sequence[Parameters], ranks: Sequence[int]) -> None:
    """Raises for a DTensor on several of these ranks, whose forwards would join parts of different probes."""
    shared: dict[DeviceMesh, bool] = {}
    for parameters in groups:
        for name, owner in zip(parameters.names, parameters.owners, strict=True):
            if not shards.is_distributed(owner):
                continue
            mesh = owner.device_mesh
            if mesh not in shared:
                shared[mesh] = len(set(mesh.mesh.flatten().tolist()).intersection(ranks)) > 1
            if shared[mesh]:
                raise ValueError(
                    f"probe_group: {name} is sharded over ranks that would evaluate other probes, so that "
                    "a forward would join parts of different weights; shard the model over other ranks than "
                    "those of probe_group, or leave probe_group out"
                )
