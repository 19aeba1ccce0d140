"""Errors of batched probes, which always name another probe that works."""

from __future__ import annotations

REMEDY = "probe='streamed' evaluates the probes one after the other"


class BatchedProbeError(RuntimeError):
    """The model or the closure cannot be run for several copies of a batch at once."""

    def __init__(self, what: str) -> None:
        super().__init__(f"batched probe: {what}; {REMEDY}")
