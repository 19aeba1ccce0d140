"""What the members of an elastic group write down: their losses, and what a round goes on with."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal, NamedTuple

Shares = Literal["batches", "probes"]


class Identity(NamedTuple):
    """What all members must have alike.

    Attributes:
        recipe: of the recipe, the seed, the step and the version.
        options: of lr, mu and weight decay of all groups.
        weighs: whether losses have weights; None if this is not known.
        weights: a digest of the weights; None if they are not compared.
        random: of the random generators after the probes; None if these drew no random numbers.
    """

    recipe: int
    options: int
    weighs: int | None = None
    weights: int | None = None
    random: int | None = None

    def difference(self, other: Identity) -> str | None:
        """In what it differs, as in "it has other weights than the others"; None if it does not."""
        pairs = zip(_DIFFERENCES, self, other, strict=True)
        found = (what for what, own, its in pairs if own is not None and its is not None and own != its)
        return next(found, None)


_NONE = Identity(0, 0)
_DIFFERENCES = (
    "another recipe, seed or version",
    "other options (lr, mu, weight_decay)",
    "closures that return other things",
    "other weights",
    "drawn other random numbers",
)


class Place(NamedTuple):
    """A round in a run: of which step, of which estimate of the step, and of which round of that."""

    step: int
    estimate: int = 0
    round: int = 0

    def __str__(self) -> str:
        return f"{self.step}/{self.estimate}/{self.round}"


@dataclass(frozen=True)
class Post:
    """What a member has of a round.

    Attributes:
        losses: by the index of the probe.
        weight: of its losses in the average.
        base: the mean of its losses in the first round of the estimate.
        identity: what all members must have alike.
        failed: the message of the exception that its closure raised; None if it raised none.
        is_wide: whether its losses have float64.
    """

    losses: Mapping[int, float]
    weight: float = 1.0
    base: float = 0.0
    identity: Identity = _NONE
    failed: str | None = None
    is_wide: bool = False

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decoded(cls, text: bytes) -> Post:
        """Raises a ValueError for what is no post, whatever a member wrote."""
        try:
            fields: dict[str, Any] = json.loads(text)
            failed = fields["failed"]
            return cls(
                losses={int(index): float(loss) for index, loss in fields["losses"].items()},
                weight=float(fields["weight"]),
                base=float(fields["base"]),
                identity=_identity_of(fields["identity"]),
                failed=None if failed is None else str(failed),
                is_wide=bool(fields["is_wide"]),
            )
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"no post: {error!r}") from None

    def within(self, share: range) -> Post | None:
        """This, with the losses of ``share`` only; None if some are missing or the weight is negative."""
        if self.failed is not None:
            return self
        if self.weight < 0 or not self.losses.keys() >= set(share):
            return None
        return replace(self, losses={index: self.losses[index] for index in share})

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (*self.losses.values(), self.weight, self.base)))


@dataclass(frozen=True)
class Decision:
    """What the members go on with after a round.

    Attributes:
        losses: [P], NaN for probes that no loss came back for; empty if the estimate does not go on.
        members: who takes part in the next round.
        joining: who takes part from the next estimate on, besides them.
        announced: how many announcements of newcomers were heeded.
        lost: members whose losses did not come back in time.
        failed: by member, why it does not take part in what follows.
        restarts: whether the estimate begins again, with the members that are left.
        error: why no member may go on; None if they may.
        base: what losses are clipped around, as of the first round.
        identity: of its members.
        is_wide: whether losses have float64.
    """

    losses: Sequence[float]
    members: tuple[int, ...]
    joining: tuple[int, ...] = ()
    announced: int = 0
    lost: tuple[int, ...] = ()
    failed: Mapping[int, str] = field(default_factory=dict)
    restarts: bool = False
    error: str | None = None
    base: float = 0.0
    identity: Identity = _NONE
    is_wide: bool = False

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decoded(cls, text: bytes) -> Decision:
        fields: dict[str, Any] = json.loads(text)
        fields["identity"] = _identity_of(fields["identity"])
        fields["failed"] = {int(member): why for member, why in fields["failed"].items()}
        return cls(**{**fields, **{name: tuple(fields[name]) for name in ("members", "joining", "lost")}})

    @property
    def next_members(self) -> tuple[int, ...]:
        """Who takes part in the next estimate."""
        return tuple(sorted({*self.members, *self.joining}))


@dataclass(frozen=True)
class Rules:
    """How the members of a group decide; see ``ElasticGroup``."""

    shares: Shares = "batches"
    lost: Literal["continue", "raise"] = "continue"
    clip: float | None = None

    def share(self, member: int, members: Sequence[int], count: int) -> range:
        """The probes of a round of ``count`` that a member evaluates."""
        if self.shares == "batches":
            return range(count)
        return range(members.index(member), count, len(members))

    def decide(
        self,
        place: Place,
        count: int,
        members: Sequence[int],
        posts: Mapping[int, Post],
        *,
        joining: Sequence[int] = (),
        announced: int = 0,
        base: float = 0.0,
    ) -> Decision:
        """What the members go on with, of the posts that are there.

        Args:
            place: the round.
            count: its probes, P.
            members: who was to evaluate it.
            posts: by member; of some of them at least.
            joining, announced: see ``Decision``.
            base: as decided in the first round of the estimate.
        """
        shares = {member: self.share(member, members, count) for member in members}
        valid = {member: post.within(shares[member]) for member, post in posts.items()}
        # With ``clip``, the losses of one member must not make those of all not finite.
        posts = {
            member: post
            for member, post in valid.items()
            if post is not None and (self.clip is None or post.is_finite)
        }
        identity = _most_common(members, posts)
        raised, differing = _failures(members, posts, identity)
        failed = raised | differing
        there = tuple(member for member in members if member in posts and member not in failed)
        lost = tuple(member for member in members if member not in posts)
        known = Decision([], there, tuple(joining), announced, lost, failed, identity=identity)
        if (lost or failed) and (self.lost == "raise" or not there):
            left = tuple(member for member in members if member in posts and member not in differing)
            return replace(known, members=left, error=_error(place, lost, failed))
        if place.round and len(there) < len(members):
            # Earlier losses were those of other batches, or a direction has no second loss.
            return replace(known, restarts=True)
        heard = {member: posts[member] for member in there}
        if place.round == 0:
            base = self._base(heard)
        combine = self._mean if self.shares == "batches" else self._each
        losses = combine(heard, count, base)
        return replace(known, losses=losses, base=base, is_wide=any(post.is_wide for post in heard.values()))

    def _base(self, heard: Mapping[int, Post]) -> float:
        """What losses may differ from by ``clip``."""
        if self.clip is None:
            return 0.0
        if self.shares == "batches":
            return median(post.base for post in heard.values())
        losses = [loss for post in heard.values() for loss in post.losses.values()]
        return median(losses) if losses else 0.0

    def _mean(self, heard: Mapping[int, Post], count: int, base: float) -> list[float]:
        """The average over members, in the order of their numbers."""
        weights = [post.weight for post in heard.values()]
        if self.clip is not None:  # no member counts more than two
            most = 2 * median([weight for weight in weights if weight > 0] or [0.0])
            weights = [min(weight, most) for weight in weights]
        total = math.fsum(weights)
        if not total > 0:  # no member has data
            return [math.nan] * count
        found = []
        for index in range(count):
            # A member without data may have a loss that is not a number.
            terms = [
                weight * (self._clipped(post.losses[index], post.base) - post.base + base)
                if self.clip is not None
                else weight * post.losses[index]
                for weight, post in zip(weights, heard.values(), strict=True)
                if weight != 0
            ]
            found.append(_sum(terms) / total)
        return found

    def _each(self, heard: Mapping[int, Post], count: int, base: float) -> list[float]:
        losses = {index: loss for post in heard.values() for index, loss in post.losses.items()}
        return [self._clipped(losses[index], base) if index in losses else math.nan for index in range(count)]

    def _clipped(self, loss: float, base: float) -> float:
        if self.clip is None:
            return loss
        return min(max(loss, base - self.clip), base + self.clip)


def _sum(terms: Sequence[float]) -> float:
    """Rounded once, so that equal losses keep their bits; not finite if a term is not."""
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)


def _identity_of(fields: Sequence[Any]) -> Identity:
    """Raises a TypeError for other than these numbers."""
    return Identity(*(None if number is None else int(number) for number in fields))  # type: ignore[arg-type]


def _most_common(members: Sequence[int], posts: Mapping[int, Post]) -> Identity:
    """Each number of it; of equal counts, that of the member with the lowest number."""
    here = [posts[member].identity for member in members if member in posts and posts[member].failed is None]
    columns = zip(*here, strict=True) if here else [(0,), (0,), (), (), ()]
    counts = [Counter(number for number in column if number is not None) for column in columns]
    return _identity_of([count.most_common(1)[0][0] if count else None for count in counts])


def _failures(
    members: Sequence[int], posts: Mapping[int, Post], identity: Identity
) -> tuple[dict[int, str], dict[int, str]]:
    """By member, why its closure raised, and in what it differs from most others."""
    raised, differing = {}, {}
    for member in members:
        if (post := posts.get(member)) is None:
            continue
        if post.failed is not None:
            raised[member] = f"its closure raised {post.failed}"
        elif (what := post.identity.difference(identity)) is not None:
            differing[member] = f"it has {what} than the others"
    return raised, differing


def _error(place: Place, lost: Sequence[int], failed: Mapping[int, str]) -> str:
    reasons = [f"member {member} did not answer within the deadline" for member in lost]
    reasons += [f"member {member} failed: {why}" for member, why in failed.items()]
    return f"at step {place.step}, {'; '.join(reasons)}"
