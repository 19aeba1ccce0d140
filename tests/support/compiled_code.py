"""Compiles for a backend that counts the calls of compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def counting(calls: list[int], shift: float = 0.0) -> Callable[[Any], Any]:
    """``torch.compile`` for a backend that adds to ``calls[0]``, and ``shift`` to scalars that are returned.

    A shift rounds losses otherwise than code that runs as it is written.
    """
    torch.compiler.reset()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            calls[0] += 1
            return tuple(out if out.dim() else out + shift for out in graph.forward(*arguments))

        return run

    return lambda what: torch.compile(what, backend=backend)
