"""Chooses the probe for the ``probe=`` argument."""

from __future__ import annotations

import torch
from torch import nn

from zoext._parameters import wrappers
from zoext.probes.base import Probe
from zoext.probes.inplace import InplaceProbe
from zoext.probes.streamed import StreamedProbe


def is_compiled(module: nn.Module) -> bool:
    """Whether any submodule is compiled or scripted, so that its code may not use swapped weights."""
    kinds: tuple[type, ...] = (torch.jit.ScriptModule, *wrappers.compiled())
    return any(
        isinstance(part, kinds) or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def choose(probe: str | Probe, module: nn.Module | None) -> Probe:
    """The probe for ``probe=``: "auto", "inplace", "streamed" or a ``Probe``."""
    if isinstance(probe, Probe):
        return probe
    if probe not in {"auto", "inplace", "streamed"}:
        raise ValueError(f"probe must be 'auto', 'inplace', 'streamed' or a Probe, not {probe!r}")
    if probe == "streamed" and module is None:
        raise ValueError(
            "probe='streamed' needs the nn.Module whose forward is streamed: pass the module as params, or "
            "probe=zoext.StreamedProbe(module) with parameter groups"
        )
    if probe == "inplace" or module is None or (probe == "auto" and is_compiled(module)):
        return InplaceProbe()
    return StreamedProbe(module)
