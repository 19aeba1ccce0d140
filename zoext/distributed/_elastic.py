"""Processes that may be slow, fail and join during a run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._runtime.arguments import check_count
from zoext._runtime.devices import widest
from zoext.directions import Frame, Observer
from zoext.distributed import _digests
from zoext.distributed._decisions import Decision, Identity, Place, Post, Rules, Shares
from zoext.distributed._ledger import Ledger
from zoext.distributed._sharing import EstimateRestart, Losses, Share, Sharing

if TYPE_CHECKING:  # a build of torch may lack them
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]


#: How many steps a member may be behind when it asks for a part, however long they take.
_NEARLY = 2


class ElasticGroup:
    """Processes that take the steps of a run together, and may be slow, fail and join while it goes on.

    All members have the whole model. They write their losses to a store and read from it which of them the
    step goes on with, so that all of them move alike, whoever was late: the first such decision is final.

        store = torch.distributed.TCPStore(host, port, is_master=False)
        group = zoext.distributed.ElasticGroup(store, members=4, member=rank, deadline=30.0)
        optimizer = zoext.MeZO(model, process_group=group)
        for step in range(steps):
            optimizer.step(lambda: loss_of(model, batch(step, rank)))

    A member whose losses are not there at the deadline is left out. When it comes, it takes the step with the
    losses of the others, without calling its closure, and takes part again afterwards. A process that starts
    late or again passes no ``member``: it loads the weights that the run began with, replays the trajectory
    as far as it has it, and calls ``step`` like the others. Steps that were decided in the meantime run no
    closure.

    If a member is left out between two rounds of an estimate, the others evaluate that estimate again.

    Reading losses makes the host wait for the device once a round.

    Args:
        store: where the members meet, such as a ``TCPStore``. If the process that holds it ends, all members
            raise: give it a process of its own.
        members: how many the run begins with.
        member: the number of this one, from 0; None for one that joins a run, or starts again.
        shares: "batches" (default) if members have batches of their own, whose losses are averaged; "probes"
            if they have the same batch and evaluate different probes of a round. Probes that did not come
            back are then left out of the estimate (``Estimate.missing``).
        deadline: seconds from a member's own losses until it goes on without those of others: more than the
            members differ in speed. Default 60.
        lost: "continue" (default) without members that failed or did not come back in time, or "raise" on all
            of them an error that names these.
        clip: bounds what a member that lies can do; None (default) trusts all. With batches, losses of a
            member count only within ``clip`` of its own mean loss, and it counts at most twice the median
            weight. With probes, losses count only within ``clip`` of the median loss. Losses that are not
            finite count as not there.
        timeout: seconds that a process which joins waits for the others. Default 600.
        name: of the run; a run that is begun again on the same store needs another one. Default "run".

    Attributes:
        member: the number of this member.

    Raises:
        ValueError, TypeError: for arguments out of range.
    """

    def __init__(
        self,
        store: Store,
        *,
        members: int,
        member: int | None = None,
        shares: Shares = "batches",
        deadline: float = 60.0,
        lost: Literal["continue", "raise"] = "continue",
        clip: float | None = None,
        timeout: float = 600.0,
        name: str = "run",
    ) -> None:
        check_count("members", members)
        if member is not None and (isinstance(member, bool) or member not in range(members)):
            raise ValueError(f"member must be in 0 .. {members - 1}, or None to join a run, not {member!r}")
        if shares not in {"batches", "probes"}:
            raise ValueError(f"shares must be 'batches' or 'probes', not {shares!r}")
        if lost not in {"continue", "raise"}:
            raise ValueError(f"lost must be 'continue' or 'raise', not {lost!r}")
        for argument, value in (("deadline", deadline), ("timeout", timeout), ("clip", clip)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{argument} must be positive and finite, not {value!r}")
        self.rules = Rules(shares, lost, clip)
        self.ledger = Ledger(store, name)
        self.deadline = deadline
        self.timeout = timeout
        self.begins_with = range(members)
        self.is_newcomer = member is None
        self.member = self.ledger.new_member(members) if member is None else member
        if not self.ledger.claim(self.member):
            raise ValueError(
                f"member: a process of the run {name!r} has had the number {member} before. Pass member=None "
                "if this one starts again, or another name if it begins another run"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> ElasticGroup:
        raise TypeError(
            "an ElasticGroup is a process's part in a run and cannot be copied; build another optimizer with "
            "process_group=None"
        )


class ElasticRanks(Sharing):
    """The part of one member in the rounds of a run."""

    data: ProcessGroup | None = None
    probes: ProcessGroup | None = None
    receives = False
    are_several = False  # they wait until the deadline only
    waits_for_losses = True

    def __init__(self, group: ElasticGroup) -> None:
        self._group = group
        self.compares_random = group.rules.shares == "probes"
        self._ledger = group.ledger
        self._place: Place | None = None
        self._members: tuple[int, ...] = () if group.is_newcomer else tuple(group.begins_with)
        self._decided: Decision | None = None  # the last one that was read
        self._known: Decision | None = None  # that of the round at hand, if it was there before its probes
        self._has_announced = False
        self._seen = (-math.inf, 0)  # when this member was at which step, while it took no part
        self._is_open = False  # whether an estimate was begun and not ended
        self._identity = Identity(0, 0)
        self._joining: tuple[int, ...] = ()  # who waits for the next estimate as this one begins
        self._refused: str | None = None  # why this process must not take part any more
        self._base = 0.0  # the mean of the losses of the first round

    @property
    def divides_probes(self) -> bool:
        return self._group.rules.shares == "probes"

    def check(self, *, is_exact: bool, watches: bool) -> None:
        if not is_exact:
            raise ValueError(
                "process_group: probes in place restore weights up to rounding, which differs between the "
                "members of an elastic group; pass the module and probe='streamed'"
            )
        if watches:
            raise ValueError(
                "process_group: the members of an elastic group send losses only, and not the activations "
                "that this direction depends on; use another direction or a ProcessGroup"
            )

    def begin(
        self,
        groups: Sequence[Parameters],
        options: Sequence[Mapping[str, Any]],
        device: torch.device,
        *,
        is_first: bool = True,
        looks: int = 0,
    ) -> None:
        if self._refused is not None:
            raise RuntimeError(self._refused)
        if not is_first:
            raise RuntimeError(
                "process_group: an elastic group takes one estimate a step; evaluate all micro-batches in "
                "one closure, or pass a ProcessGroup"
            )
        _check_whole(groups)
        step, last = options[0]["step"], self._place
        if last is None or last.step != step:
            self._place = Place(step)
        elif self._is_open:  # this member alone gave the estimate up, and the others went on with it
            self._place = Place(step, last.estimate)
        else:
            self._place = Place(step, last.estimate + 1)
        self._is_open, self._known = True, None
        if self._decided is not None:
            self._members, self._joining = self._decided.next_members, ()
        # Also when members have come, so that these are compared too.
        is_compared = step % _digests.COMPARED_EVERY == 0 or self._decided is None or self._decided.joining
        digest = int(_digests.of_weights(groups, device)) if is_compared else None
        self._identity = Identity(
            _digests.of_recipe(options), _digests.of_options(options, may_wait=True), None, digest
        )

    def check_asking(self) -> None:
        raise RuntimeError(
            "process_group: ask() is for one process; the members of an elastic group take step(closure)"
        )

    def _check_reachable(self) -> None:
        """Raises if others are further than a round that this member knows no decision of."""
        latest, step = self._ledger.latest(), self._at.step
        if latest is not None and step < latest and self._ledger.decision(self._at) is None:
            raise RuntimeError(
                f"process_group: this member is at step {step} and the run at step {latest}, and the "
                "decisions between are not kept any more, or are those of another program; begin with the "
                "weights of the run, and replay its trajectory"
            )

    def dealt(self, count: int) -> Sequence[int]:
        self._known = self._ledger.decision(self._at)
        if self._known is None:
            self._check_reachable()
        if not self._takes_part and self._at.round == 0:
            self._announce()
        if self._known is not None or not self._takes_part:
            return ()
        return self._group.rules.share(self._group.member, self._members, count)

    @property
    def _takes_part(self) -> bool:
        return self._group.member in self._members

    def _announce(self) -> None:
        """Asks for a part in the estimates to come, once this member can catch up while the others wait."""
        now, step = time.monotonic(), self._at.step
        (then, before), self._seen = self._seen, (now, step)
        if self._has_announced:
            return
        behind = (self._ledger.latest() or 0) - step
        pace = (now - then) / max(step - before, 1)  # seconds a step
        if behind > _NEARLY and behind * pace > self._group.deadline / 2:
            return
        self._ledger.announce(self._group.member)
        self._has_announced = True

    def exchanged(self, share: Share, seeds: Tensor) -> Losses:
        decision = self._known or self._decision(self._post(share, seeds), share.size)
        losses = self._followed(decision, share, seeds.device)
        self._known = None
        return losses

    def end(self) -> None:
        self._is_open = False

    def restart(self) -> None:
        assert self._decided is not None
        self._place = Place(self._at.step, self._at.estimate + 1)
        # Who has joined takes part in the next estimate, which begins with a comparison of weights.
        self._members, self._joining = self._decided.members, self._decided.joining
        self._known = None

    def fail(self, count: int, seeds: Tensor, error: Exception, *, is_dealt: bool = True) -> Tensor | None:
        if self._known is not None or not self._takes_part:
            return None
        post = Post({}, failed=f"{type(error).__name__}: {error}"[:200])
        self._ledger.post(self._at, self._group.member, post)
        decision = self._decision(None, count)
        if decision.error is not None:  # as on the other members
            self._decided, self._is_open = decision, False
        return None

    def frame(
        self,
        observer: Observer,
        has_seen: bool,
        keys: Sequence[int],
        device: torch.device,
        weight: Tensor | None = None,
    ) -> tuple[Frame, Tensor] | None:
        raise RuntimeError("the members of an elastic group do not share activations: see check()")

    def raise_if_differing(self) -> None:
        """Nothing is found later than in the round itself."""

    @property
    def _at(self) -> Place:
        assert self._place is not None
        return self._place

    def _post(self, share: Share, seeds: Tensor) -> Post | None:
        if not self._takes_part:
            return None
        losses = {index: float(loss) for index, loss in share.losses.items()}
        if self._at.round == 0:
            self._base = math.fsum(losses.values()) / max(len(losses), 1) if _finite(losses) else math.nan
        return Post(
            losses,
            1.0 if share.weight is None else float(share.weight),
            self._base,
            self._identity._replace(weighs=int(share.weight is not None), random=share.random),
            is_wide=any(loss.dtype == torch.float64 for loss in share.losses.values()),
        )

    def _decision(self, post: Post | None, count: int) -> Decision:
        """Writes ``post`` and waits for the decision; makes it if others do not."""
        place, member, ledger = self._at, self._group.member, self._ledger
        takes_part = self._takes_part
        if post is not None:
            ledger.post(place, member, post)
        found: Decision | None = None
        decides = takes_part and member == self._members[0]

        def is_over() -> bool:
            nonlocal found
            found = ledger.decision(place)
            return found is not None or (decides and ledger.is_complete(place, self._members))

        # The first member decides. If it is lost, the others do a little later.
        deadline = self._group.deadline * (1 if decides else 1.5)
        in_time = ledger.wait(is_over, deadline if takes_part else self._group.timeout)
        if found is not None:
            return found
        if not in_time and not takes_part:
            raise RuntimeError(
                f"process_group: no member of the run decided step {place.step} within "
                f"{self._group.timeout:g} s (timeout); begin the run again with other members"
            )
        self._check_reachable()
        return self._proposed(count)

    def _proposed(self, count: int) -> Decision:
        place, last = self._at, self._decided
        joining, since = ((), 0) if last is None else (last.joining, last.announced)
        if place.round == 0:
            joining = self._joining
        new, announced = self._ledger.announced(since)
        decision = self._group.rules.decide(
            place,
            count,
            self._members,
            self._ledger.posts(place, self._members),
            joining=[*joining, *new],
            announced=announced,
            base=last.base if last is not None else 0.0,
        )
        return self._ledger.propose(place, decision)

    def _followed(self, decision: Decision, share: Share, device: torch.device) -> Losses:
        place = self._at
        if self._group.member in decision.next_members:
            self._has_announced = False
        self._decided, self._members = decision, decision.members
        if self._known is None and (why := decision.failed.get(self._group.member)) is not None:
            self._refused = f"process_group: member {self._group.member} is not one of this run: {why}"
            raise RuntimeError(self._refused)
        if (
            what := self._identity._replace(weights=None, random=None).difference(decision.identity)
        ) is not None:
            self._refused = f"process_group: this member has {what} than the run; give it those of the run"
            raise RuntimeError(self._refused)
        if decision.error is not None:
            self._is_open = False
            raise RuntimeError(f"process_group: {decision.error}. No weight has moved in this step")
        if decision.restarts:
            raise EstimateRestart
        self._place = place._replace(round=place.round + 1)
        values = torch.tensor(
            decision.losses,
            dtype=widest(device) if decision.is_wide else torch.float32,
            device=device,
        )
        return self._losses(decision, share, values)

    def _losses(self, decision: Decision, share: Share, values: Tensor) -> Losses:
        lost = {*decision.lost, *decision.failed}
        if self._group.rules.shares == "batches":
            return Losses(values, lost=len(lost) * share.size)
        before = tuple(sorted(lost | set(decision.members)))
        rules = self._group.rules
        missing = sorted(i for member in lost for i in rules.share(member, before, share.size))
        return Losses(values, tuple(missing), len(missing))


def _check_whole(groups: Sequence[Parameters]) -> None:
    for group in groups:
        for name, owner in zip(group.names, group.owners, strict=True):
            if shards.is_distributed(owner):
                raise ValueError(
                    f"process_group: {name} is a DTensor, and the members of an elastic group have whole "
                    "models; pass a ProcessGroup"
                )


def _finite(losses: Mapping[int, float]) -> bool:
    return all(map(math.isfinite, losses.values()))
