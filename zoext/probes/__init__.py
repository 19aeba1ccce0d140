"""Probes evaluate the loss at ``theta + combination`` and restore theta afterwards."""

from zoext.probes._batched.errors import BatchedProbeError
from zoext.probes._choice import choose
from zoext.probes._running import StreamedProbeError
from zoext.probes.base import Probe, Session
from zoext.probes.batched import BatchedProbe, BatchedSession
from zoext.probes.inplace import InplaceProbe
from zoext.probes.streamed import StreamedProbe

__all__ = [
    "BatchedProbe",
    "BatchedProbeError",
    "BatchedSession",
    "InplaceProbe",
    "Probe",
    "Session",
    "StreamedProbe",
    "StreamedProbeError",
    "choose",
]
