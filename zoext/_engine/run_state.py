"""The state of a run besides its weights and parameter groups."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from zoext._engine.applying import Recorder
from zoext._engine.estimation import FoundFrame
from zoext._engine.open_round import Asking, OpenRound
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
    """

    pending: list[Estimate] = field(default_factory=list)
    frame: FoundFrame | None = None
    asking: Asking | None = None
    last_estimate: Estimate | None = None
    recorder: Recorder | None = None
    is_estimating: bool = False
    is_torn: bool = False

    @property
    def open_round(self) -> OpenRound | None:
        """The round that ``ask`` or ``tell`` returned, until its losses are passed to ``tell``."""
        return self.asking.round if self.asking is not None else None

    def cancel_round(self) -> None:
        """Drops the open round."""
        if self.asking is not None:
            self.asking.cancel()
            self.asking = None

    def cancel(self) -> None:
        """Drops the open round and the pending estimates."""
        self.pending.clear()
        self.cancel_round()
