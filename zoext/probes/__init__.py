"""Probes evaluate the loss at ``theta + combination`` and restore theta afterwards."""

from zoext.probes._choice import choose
from zoext.probes._swap import StreamedProbeError
from zoext.probes.base import Probe, Session
from zoext.probes.inplace import InplaceProbe
from zoext.probes.streamed import StreamedProbe

__all__ = [
    "InplaceProbe",
    "Probe",
    "Session",
    "StreamedProbe",
    "StreamedProbeError",
    "choose",
]
