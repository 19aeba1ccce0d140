"""Chooses the probe for the ``probe=`` argument."""

from __future__ import annotations

import torch
from torch import nn

from zoext._parameters import wrappers
from zoext.probes.base import Probe
from zoext.probes.batched import BatchedProbe
from zoext.probes.inplace import InplaceProbe
from zoext.probes.streamed import StreamedProbe


def _is_exported(module: nn.Module) -> bool:
    """Whether any submodule is a graph, as of torch.export, that reads the weights of modules it never calls.

    A streamed probe would displace all of these for the whole closure. Graphs that were traced symbolically
    call the modules.
    """
    graphs = (part for part in module.modules() if isinstance(part, torch.fx.GraphModule))
    return any(_reads_below(graph) for graph in graphs if any(p.requires_grad for p in graph.parameters()))


def _reads_below(module: torch.fx.GraphModule) -> bool:
    nodes = module.graph.nodes
    called = [module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    if any(True for part in called for _ in part.parameters()):
        return False
    return any(node.op == "get_attr" and "." in str(node.target) for node in nodes)


def choose(probe: str | Probe, module: nn.Module | None) -> Probe:
    """The probe for ``probe=``: "auto", "inplace", "streamed", "batched" or a ``Probe``."""
    if isinstance(probe, Probe):
        return probe
    if probe not in {"auto", "inplace", "streamed", "batched"}:
        raise ValueError(f"probe must be 'auto', 'inplace', 'streamed', 'batched' or a Probe, not {probe!r}")
    if probe in {"streamed", "batched"} and module is None:
        raise ValueError(
            f"probe={probe!r} needs the nn.Module whose forward is {probe}: pass the module as params, or "
            f"probe=zoext.{probe.capitalize()}Probe(module) with parameter groups"
        )
    if probe == "batched" and module is not None:
        return BatchedProbe(module)
    if module is None or probe == "inplace":
        return InplaceProbe(module)
    if probe == "auto" and (wrappers.is_compiled(module) or _is_exported(module)):
        return InplaceProbe(module)
    return StreamedProbe(module)
