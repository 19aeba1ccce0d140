"""Module classes of other packages: those that wrap a model, and linear layers with transposed weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import nn


def compiled() -> tuple[type[nn.Module], ...]:
    """The class of modules that torch.compile returns; empty if dynamo was not imported."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    found: tuple[type[nn.Module], ...] = (dynamo.OptimizedModule,) if dynamo else ()
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether any submodule is compiled or scripted, so that its code may not use swapped weights."""
    kinds: tuple[type, ...] = (torch.jit.ScriptModule, *compiled())
    return any(
        isinstance(part, kinds) or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def conv1d() -> tuple[type[nn.Module], ...]:
    """The linear layer of GPT-2, which stores its weight as [d_in, d_out]; empty if it was not imported."""
    transformers = sys.modules.get("transformers.pytorch_utils")  # importing it takes seconds
    found: tuple[type[nn.Module], ...] = (transformers.Conv1D,) if transformers else ()
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """The module within wrappers of torch.compile and DistributedDataParallel, which they call."""
    kinds: tuple[type[nn.Module], ...] = (*compiled(), nn.parallel.DistributedDataParallel)
    while isinstance(module, kinds):
        inner = module._orig_mod if isinstance(module, compiled()) else module.module
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of ``module``; names omit prefixes of torch.compile and DistributedDataParallel."""
    kinds = dict.fromkeys(compiled(), "_orig_mod") | {nn.parallel.DistributedDataParallel: "module"}
    for name, parameter in module.named_parameters():
        yield ".".join(_own_parts(name.split("."), module, kinds)), parameter


def _own_parts(parts: Sequence[str], module: nn.Module, kinds: dict[type[nn.Module], str]) -> Iterator[str]:
    for part in parts:
        if not any(isinstance(module, kind) and part == inner for kind, inner in kinds.items()):
            yield part
        module = getattr(module, part)
