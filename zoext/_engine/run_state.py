"""The state of a run besides its weights and parameter groups."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from zoext._engine.applying import Recorder
from zoext._engine.estimation import FoundFrame
from zoext._engine.open_round import Asking, OpenRound
from zoext._parameters.parameters import Parameters
from zoext.estimators import Estimate


class Owner(Protocol):
    """The interface of the optimizer that the engine uses."""

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> MutableMapping[Tensor, Any]: ...


@dataclass
class RunState:
    """The state of a run besides weights and ``param_groups``; all wrappers of an optimizer share it.

    Attributes:
        pending: estimates since the last step.
        frame: the frame of the step that they belong to.
        asking: the last estimate by ``ask`` and ``tell``, whose round may be open.
        last_estimate: the estimate that the last step applied.
        recorder: receives every step.
        is_estimating: whether a closure is running.
        is_torn: whether an update raised after it had moved some of the parameters.
        has_kept: whether estimates are kept aside while ``step(closure)`` makes another one.
        sums_changed: how often steps were added to the sums of ``LowRank(defer=True)``.
    """

    pending: list[Estimate] = field(default_factory=list)
    frame: FoundFrame | None = None
    asking: Asking | None = None
    last_estimate: Estimate | None = None
    recorder: Recorder | None = None
    is_estimating: bool = False
    is_torn: bool = False
    has_kept: bool = False
    sums_changed: int = 0

    @property
    def open_round(self) -> OpenRound | None:
        """The round that ``ask`` or ``tell`` returned, until its losses are passed to ``tell``."""
        return self.asking.round if self.asking is not None else None

    def check_recorder(self) -> None:
        """Raises if the next step could not be recorded."""
        if self.recorder is not None:
            self.recorder.check()

    @contextmanager
    def keeping_pending(self) -> Iterator[list[Estimate]]:
        """Yields the pending estimates, and has none within the block."""
        kept, self.pending = self.pending, []
        self.has_kept = bool(kept)
        try:
            yield kept
        finally:
            self.has_kept = False

    def cancel_round(self) -> None:
        """Drops the open round."""
        if self.asking is not None:
            self.asking.cancel()
            self.asking = None

    def cancel(self) -> None:
        """Drops the open round and the pending estimates."""
        self.pending.clear()
        self.cancel_round()

    @contextmanager
    def tearing(self, groups: Sequence[Parameters]) -> Iterator[None]:
        """Marks the run as torn if the block raises after it has modified a parameter or a sum."""
        before = _versions(groups), self.sums_changed
        try:
            yield
        except BaseException:
            self.is_torn = (_versions(groups), self.sums_changed) != before
            raise

    def check_no_round(self) -> None:
        """Raises a RuntimeError while ``ask`` waits for losses."""
        if self.open_round is not None:
            raise RuntimeError(
                "a round is open: pass its losses to tell() until that returns None, or call cancel() first"
            )

    def check_between_closures(self) -> None:
        """Raises a RuntimeError within a closure."""
        if self.is_estimating:
            raise RuntimeError(
                "the optimizer was called by its own closure, or within displaced(); call it between steps"
            )

    def check_whole(self) -> None:
        """Raises a RuntimeError after an update that raised halfway."""
        if self.is_torn:
            raise RuntimeError(
                "an update raised when it had moved some of the parameters: it was only partly applied. "
                "Load the weights and the state_dict of a checkpoint, or replay the trajectory on the base"
            )


def _versions(groups: Sequence[Parameters]) -> list[int]:
    return [tensor._version for group in groups for tensor in group.tensors]
