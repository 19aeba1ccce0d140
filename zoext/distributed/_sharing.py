"""How the processes of a run share the probes and the losses of a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from zoext._parameters.parameters import Parameters
from zoext.directions import Frame, Observer

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed import ProcessGroup


class Share(NamedTuple):
    """The losses of a round that this process has.

    Attributes:
        losses: [] each, by the index of the probe.
        size: how many probes the round has, P.
        weight: of these losses in the average over processes, []; None if the closure returns none.
        random: a number for the random generators after these probes; None if these read none.
        is_whole: whether they are all losses of the round that there are, whoever evaluated them.
    """

    losses: Mapping[int, Tensor]
    size: int
    weight: Tensor | None = None
    random: int | None = None
    is_whole: bool = False


class Losses(NamedTuple):
    """The losses of a round that all processes go on with.

    Attributes:
        values: [P], NaN for probes in ``missing``.
        missing: the probes that nobody's loss came back for in time.
        lost: how many losses did not come back in time, over all processes.
    """

    values: Tensor
    missing: tuple[int, ...] = ()
    lost: int = 0


class EstimateRestart(Exception):
    """The rounds of this estimate must be evaluated again: other processes take part than when it began."""


class Sharing(ABC):
    """Divides rounds over processes and combines their losses, so that all of them take the same step."""

    #: Whether processes with the same batch must draw the same random numbers, which nothing else tells.
    compares_random: bool = False
    #: Whether the host waits for the losses of a round, so that no graph can capture it.
    waits_for_losses: ClassVar[bool] = False

    @property
    @abstractmethod
    def data(self) -> ProcessGroup | None:
        """The ranks with other batches, whose losses are reduced in a collective; None if there are none."""

    @property
    @abstractmethod
    def probes(self) -> ProcessGroup | None:
        """The ranks with other probes, likewise."""

    @property
    @abstractmethod
    def are_several(self) -> bool:
        """Whether other ranks wait for this one in the collectives of a step."""

    @property
    @abstractmethod
    def divides_probes(self) -> bool:
        """Whether processes evaluate different probes of a round."""

    @property
    @abstractmethod
    def receives(self) -> bool:
        """Whether frames may come from other processes, without the forward that finds them."""

    @abstractmethod
    def check(self, *, is_exact: bool, watches: bool) -> None:
        """Raises a ValueError for probes or directions that cannot be shared.

        Args:
            is_exact: whether the probe restores weights bit for bit.
            watches: whether directions depend on activations.
        """

    @abstractmethod
    def begin(
        self,
        groups: Sequence[Parameters],
        options: Sequence[Mapping[str, Any]],
        device: torch.device,
        *,
        is_first: bool = True,
        looks: int = 0,
    ) -> None:
        """Begins an estimate, the first one of a step or another.

        ``looks`` is a number that must be the same on all ranks: of the merges of ``LowRank(defer=True)``.

        Raises:
            RuntimeError: if the processes were found not to belong together.
            ValueError: for parameters that they do not share.
        """

    def check_asking(self) -> None:  # noqa: B027
        """Raises a RuntimeError if the caller cannot evaluate the probes of a round."""

    @abstractmethod
    def dealt(self, count: int) -> Sequence[int]:
        """The probes of a round of ``count`` that this process evaluates."""

    @abstractmethod
    def exchanged(self, share: Share, seeds: Tensor) -> Losses:
        """The losses of the round, after all processes have called this.

        Args:
            share: those of this process.
            seeds: those of the step, int64.

        Raises:
            EstimateRestart: if the estimate must begin again.
            RuntimeError: if the processes do not belong together, or one of them failed.
        """

    def end(self) -> None:  # noqa: B027
        """Called when an estimate is complete."""

    def restart(self) -> None:  # noqa: B027
        """Called before the rounds of an estimate are evaluated again."""

    @abstractmethod
    def fail(self, count: int, seeds: Tensor, error: Exception, *, is_dealt: bool = True) -> Tensor | None:
        """Takes part in a round that raised ``error`` on this process, so that no other waits for it.

        Returns the losses that the others go on with, which are not finite: on a device they learn of the
        error one step later. None if they do not go on with the estimate, or without this process.

        Args:
            count: how many probes the round has.
            seeds: those of the step.
            error: what was raised.
            is_dealt: whether the probes were dealt out, and not evaluated by a caller that tells losses.
        """

    @abstractmethod
    def frame(
        self,
        observer: Observer,
        has_seen: bool,
        keys: Sequence[int],
        device: torch.device,
        weight: Tensor | None = None,
    ) -> tuple[Frame, Tensor] | None:
        """The frame of the step, and whether the activations behind it were finite.

        None if no process has seen activations.

        Args:
            observer: of this process.
            has_seen: whether its forward has run.
            keys: those of all parameters that move.
            device: where the losses are.
            weight: of the losses of this process, []; with 0, its activations do not count.
        """

    @abstractmethod
    def raise_if_differing(self) -> None:
        """Raises a RuntimeError that names a rank, if a round found one that differs."""
