"""Modules that wrap another one to run it: what they add to names of parameters is no part of the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import nn


def compiled() -> tuple[type[nn.Module], ...]:
    """The class of what torch.compile makes of a module; none as long as nothing was compiled."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    found: tuple[type[nn.Module], ...] = (dynamo.OptimizedModule,) if dynamo else ()
    return found


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of ``module``, by the names they have without torch.compile and DistributedDataParallel."""
    kinds = dict.fromkeys(compiled(), "_orig_mod") | {nn.parallel.DistributedDataParallel: "module"}
    for name, parameter in module.named_parameters():
        yield ".".join(_own_parts(name.split("."), module, kinds)), parameter


def _own_parts(parts: Sequence[str], module: nn.Module, kinds: dict[type[nn.Module], str]) -> Iterator[str]:
    for part in parts:
        if not any(isinstance(module, kind) and part == inner for kind, inner in kinds.items()):
            yield part
        module = getattr(module, part)
