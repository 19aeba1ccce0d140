"""One estimate in progress: evaluates the rounds of an estimator in the frame of a step."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from zoext._engine import copies
from zoext._engine.context import StepContext
from zoext._engine.first_order import explained_backward
from zoext._engine.missing_losses import MissingLosses
from zoext._parameters import shards
from zoext._runtime.devices import moved, widest
from zoext._runtime.randomness import RandomState
from zoext.directions import Frame, Observer, Step, Terms
from zoext.distributed import EstimateRestart, Share, Sharing
from zoext.estimators import Estimate, Round, Rounds, centre_first, evaluate
from zoext.probes import BatchedSession, Session

#: The loss, or the loss and its weight in the average over ranks.
Loss = Tensor | float | tuple[Tensor | float, Tensor | float]
Closure = Callable[..., Loss]


class MissingLossError(TypeError):
    """A closure returned nothing."""

    def __init__(self) -> None:
        super().__init__(
            "closure must return the loss as a tensor of one element or a float, not None; did it forget to "
            "return the loss? (A step() of Lightning has no closure: call estimate(closure) before it)"
        )


class FoundFrame(NamedTuple):
    """The frame of a step. ``finite`` (bool []) is None if the frame is drawn from seeds."""

    frame: Frame
    finite: Tensor | None


class Estimation:
    """Evaluates probes at one theta, and determines the frame of the step if that takes a forward.

    Args:
        context: the context of the step.
        found: the frame of an earlier estimate of the same step; None determines a new one.
        ranks: the ranks that take the step together.
        check: called after every probe; raises if the probe changed the parameters.
        check_recorder: raises if the step could not be recorded. It is called if there are several ranks,
            which learn of it when they exchange the losses of a round. This is after its probes, because the
            forwards of sharded models need all ranks.
        may_be_missing: whether the closure may return None, as one does that stands for pending estimates.
            Other processes are not told then, since theirs return None too.
    """

    def __init__(
        self,
        context: StepContext,
        found: FoundFrame | None,
        ranks: Sharing,
        check: Callable[[], None],
        check_recorder: Callable[[], None],
        may_be_missing: bool = False,
    ) -> None:
        self.context = context
        self.ranks = ranks
        self._check = check
        self._check_recorder = check_recorder
        self._observer: Observer | None = None
        if found is None:
            step = Step(context.seeds.frame, context.groups, is_part=ranks.data is not None)
            self._observer = context.axes.direction.observer(context.module, step)
            if self._observer is None:
                found = FoundFrame(context.axes.direction.frame(step), None)
        self._found = found
        self._error: Exception | None = None  # that this process raised
        self._may_be_missing = may_be_missing
        self._has_seen = False  # whether the observer has seen its forward
        self._random: RandomState | None = None  # before the first probe
        self._round: Round | None = None
        self._probes: list[tuple[Tensor, Tensor]] = []
        self._last = 0
        self._repeated = 0
        self._ran_uncompiled = False
        self._nearest: int | None = None  # of the first round
        self._missing = MissingLosses()

    def check_frame(self, what: str) -> None:
        """Raises a RuntimeError if the frame is unknown: the first probe, at theta, determines it."""
        if self._found is None and not self._has_seen and not self.ranks.receives:
            raise self._error_without_frame(what)

    def _error_without_frame(self, what: str) -> RuntimeError:
        direction = type(self.context.axes.direction).__name__
        return RuntimeError(
            f"{what}: {direction} finds its basis in a forward at theta; run the model within "
            "displaced(0) of the first round before"
        )

    @property
    def found(self) -> FoundFrame:
        """The frame of the step; it must be known."""
        assert self._found is not None
        return self._found

    def rounds(self) -> Rounds:
        """The rounds of the estimator, after a round with one probe at theta if the frame is unknown."""
        context = self.context
        rounds = context.axes.estimator.rounds(context.seeds.draws, context.mus[0])
        return rounds if self._observer is None else centre_first(rounds)

    def run(self, session: Session, closure: Closure) -> Estimate:
        """Evaluates ``closure`` at each probe in turn, and returns the estimate."""

        def losses_of(pending: Round) -> Tensor:
            if self._error is not None:
                return self._without_own(pending, self._error)
            dealt = self.ranks.dealt(len(pending))
            self.begin(pending, dealt)
            try:
                own = self._evaluated_all(session, dealt, closure)
                weight = _common_weight([weight for _, weight in own.values()])
                if self.ranks.are_several:
                    self._check_recorder()
            except Exception as error:
                if self._may_be_missing and isinstance(error, MissingLossError):
                    raise
                self._error = error
                return self._without_own(pending, error)
            losses = {index: loss for index, (loss, _) in own.items()}
            random = self._random_number() if self.ranks.compares_random else None
            return self.reduced(Share(losses, len(pending), weight, random))

        try:
            estimate = self._completed(losses_of)
        except Exception:
            if self.ranks.divides_probes and self._random is not None:
                self._random.restore()  # ranks got differently far
            raise
        if not self._repeated:
            return estimate
        return dataclasses.replace(estimate, forwards=estimate.forwards + self._repeated)

    def _random_number(self) -> int | None:
        """A number for the random generators, if probes read them."""
        if self._random is None or not self._random.read_since():
            return None
        return RandomState(*self.context.devices).digest()

    def check_own(self) -> None:
        """Raises the error of this process, if other ones went on with the estimate nevertheless."""
        if self._error is not None:
            raise self._error

    def _without_own(self, pending: Round, error: Exception) -> Tensor:
        """Takes part in a round after this process raised, and in the frame, for as long as others go on."""
        losses = self.ranks.fail(len(pending), self.context.seeds.draws, error)
        if losses is None:
            raise error
        if self._found is None:
            self._has_seen = False
            self._find_frame(torch.zeros_like(losses[0]))
        return losses

    def _completed(self, losses_of: Callable[[Round], Tensor]) -> Estimate:
        while True:
            try:
                return self.complete(evaluate(self.rounds(), losses_of))
            except EstimateRestart:
                self.restart()

    def restart(self) -> None:
        """Forgets the rounds so far, which other processes took part in than are left."""
        self._round, self._missing = None, MissingLosses()
        self.ranks.restart()

    def is_to_repeat(self, session: Session) -> bool:
        """Whether the last probe must be evaluated again to be comparable with the others."""
        ran_uncompiled, self._ran_uncompiled = self._ran_uncompiled, False
        return session.is_to_repeat() or ran_uncompiled

    def _evaluated_all(
        self, session: Session, dealt: Sequence[int], closure: Closure
    ) -> dict[int, tuple[Tensor, Tensor | None]]:
        """The losses at some probes of the round, and their weights."""
        if not isinstance(session, BatchedSession):
            return {index: self._evaluated(session, index, closure) for index in dealt}
        if self._observer is not None and not self._has_seen:
            one = partial(closure, 1)  # whose activations are those of the batch itself
            return {index: self._evaluated(session, index, one) for index in dealt}
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        for indices in copies.portions(dealt, session.max_copies):
            found.update(self._evaluated_at_once(session, indices, partial(closure, len(indices))))
        return found

    def _evaluated_at_once(
        self, session: BatchedSession, indices: Sequence[int], closure: Closure
    ) -> dict[int, tuple[Tensor, Tensor | None]]:
        """The losses at probes that are evaluated in one forward."""

        def run() -> object:
            self._share_random()
            with session.interruptible(), explained_backward():
                found = closure()
                if found is None:
                    raise MissingLossError
            copies.split(found, len(indices), device)  # raises
            return found

        device = self.context.device
        assert self._round is not None
        combination = self.context.combination(*copies.terms_of(self._round, indices), self.found.frame)
        losses, weight = copies.split(session.losses(combination, len(indices), run), len(indices), device)
        self._check()
        weight = None if weight is None else as_weight(weight, device)
        return {index: (loss, weight) for index, loss in zip(indices, losses, strict=True)}

    def _share_random(self) -> None:
        """Gives the random generators the state that every probe starts from."""
        if self.context.shares_random:
            if self._random is None:
                self._random = RandomState(*self.context.devices)
            else:
                self._random.restore()

    def _evaluated(self, session: Session, index: int, closure: Closure) -> tuple[Tensor, Tensor | None]:
        """The loss at a probe, and its weight if the closure returns one."""
        found = self._loss_of(session, index, closure)
        while self.is_to_repeat(session):
            found = self._loss_of(session, index, closure)
            self._repeated += 1
        loss, weight = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        device = self.context.device
        return as_loss(loss, device), None if weight is None else as_weight(weight, device)

    def _loss_of(self, session: Session, index: int, closure: Closure) -> Loss:
        with self.displaced(session, index), session.interruptible(), explained_backward():
            loss = closure()
            if loss is None:
                raise MissingLossError
        return loss

    def begin(self, pending: Round, evaluated: Sequence[int]) -> None:
        """Makes ``pending``, of which this rank evaluates some probes, the round of ``displaced``."""
        is_first = self._round is None
        self._round, self._probes = pending, list(pending.probes())
        centre = next((index for index in evaluated if not len(self._probes[index][0])), None)
        self._nearest = next(iter(evaluated), None) if centre is None else centre
        if not is_first:
            self._nearest = None

    @contextmanager
    def displaced(self, session: Session, index: int) -> Iterator[None]:
        """Displaces theta to probe ``index`` of the round within the block."""
        observer = None if self._has_seen else self._observer
        frame = self._found.frame if self._found is not None else Frame()
        combination = self.context.combination(*self._probes[index], frame)
        self._last = index
        self._share_random()
        with (
            session.displaced(combination, keep_buffers=self.moves_buffers(index)),
            # Inside, because the session reads weights itself.
            observer.watching() if observer is not None else nullcontext(),
        ):
            yield
        self._check()
        if observer is not None:
            self._has_seen, self._ran_uncompiled = True, observer.ran_uncompiled

    def told(self, share: Share) -> Tensor:
        """``reduced``, of the losses of a whole round that the caller computed."""
        try:
            if self.ranks.are_several:
                self._check_recorder()
        except Exception as error:
            self.ranks.fail(share.size, self.context.seeds.draws, error, is_dealt=False)
            raise
        return self.reduced(share)

    def reduced(self, share: Share) -> Tensor:
        """The losses of the round, [P], that all processes go on with. Then the frame is known."""
        losses = self.ranks.exchanged(share, self.context.seeds.draws)
        assert self._round is not None
        self._missing = self._missing.after(self._round, losses, self.context.axes.estimator)
        if self._found is None:
            self._find_frame(share.weight)
        return losses.values

    def _find_frame(self, weight: Tensor | None) -> None:
        assert self._observer is not None  # which the frame comes from if it is not drawn
        keys = [key for group in self.context.groups for key in group.keys]
        found = self.ranks.frame(self._observer, self._has_seen, keys, self.context.device, weight)
        if found is None:
            raise self._error_without_frame("tell")
        self._found, self._observer = FoundFrame(*found), None

    def moves_buffers(self, index: int) -> bool:
        """Whether buffers get the values that modules write in this probe of the round: the one at theta."""
        return index == self._nearest

    def probe(self, index: int) -> tuple[Tensor, Tensor]:
        """Seeds [k] and coefficients [k] of a probe of the round."""
        return self._probes[index]

    def displacement(self, position: int) -> Terms:
        """The displacement of the group at ``position`` in the last probe, over all seeds of its round."""
        assert self._round is not None
        return self.context.terms(
            position, self._round.seeds, self._round.coefficients[self._last], self.found.frame
        )

    def complete(self, estimate: Estimate) -> Estimate:
        """The estimate of the losses that are there; zero if activations behind its frame were not finite."""
        self.ranks.end()
        if self._missing.lost:
            estimate = self._missing.without(estimate, averages=self.context.axes.estimator.averages)
        finite = self.found.finite
        if finite is None:
            return estimate
        return dataclasses.replace(
            estimate,
            coefficients=torch.where(finite, estimate.coefficients, 0.0),
            finite=estimate.finite & finite,
        )


def as_loss(loss: object, device: torch.device, what: str = "closure") -> Tensor:
    """A loss as a tensor [] of at least float32 on ``device``; ``what`` names it in error messages."""
    must = "must return" if what == "closure" else "must be"
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"{what} {must} one number, not a tensor of shape {tuple(loss.shape)}; "
                "reduce it, as with .mean()"
            )
        if loss.is_complex():
            raise TypeError(f"{what} {must} a real number, not {loss.dtype}")
        loss = shards.whole(loss.detach()).reshape(())  # loss-parallel models return a DTensor
        dtype = widest(device) if loss.dtype == torch.float64 else torch.float32
        return moved(loss.to(dtype), device)
    if isinstance(loss, bool) or not isinstance(loss, numbers.Real):
        article = "the loss as " if what == "closure" else ""
        raise TypeError(f"{what} {must} {article}a tensor of one element or a float, not {loss!r}")
    # A loss that is no number, as of a rank without data, does not tell the dtype of the others.
    dtype = torch.float32 if math.isnan(loss) else widest(device)
    return torch.full((), float(loss), dtype=dtype, device=device)


def as_weight(weight: object, device: torch.device) -> Tensor:
    """The weight of a loss as a tensor [] on ``device``."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex():
            raise ValueError(
                f"closure: the weight of the loss must be one real number, not a tensor of shape "
                f"{tuple(weight.shape)} and {weight.dtype}"
            )
        return moved(weight.detach().reshape(()).to(widest(device)), device)
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 <= float(weight) < math.inf:
        raise ValueError(f"closure: the weight of the loss must be a number of at least 0, not {weight!r}")
    return torch.full((), float(weight), dtype=widest(device), device=device)


def _common_weight(weights: Sequence[Tensor | None]) -> Tensor | None:
    """The weight of all losses of a round; NaN if they differ, so that no weight of the model moves."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) != len(weights):
        raise TypeError("closure: it returned (loss, weight) at some probes and a loss alone at others")
    stacked = torch.stack(given)
    is_right = ((stacked == given[0]) & (stacked >= 0)).all()
    if stacked.device.type == "cpu" and not is_right:
        raise ValueError(
            "closure: the weight of the loss must be at least 0 and the same at all probes, not "
            f"{stacked.tolist()}"
        )
    return torch.where(is_right, given[0], torch.nan)
