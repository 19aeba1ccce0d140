"""The modules that run with displaced weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from zoext.probes._buffers import SwappedBuffer

#: Seconds until a view of displaced weights counts as kept.
GRACE = 1.0


class StreamedProbeError(RuntimeError):
    """The model cannot be streamed: it uses weights while the modules that own them are not running."""


class Swapped(NamedTuple):
    """A parameter that points to displaced values."""

    parameter: Tensor
    local: Tensor  # the tensor that points to them: for a DTensor, its part
    original: Tensor


class Running:
    """A running module: its original tensors, and the state of the scratch memory before it ran."""

    def __init__(self, top: dict[torch.device, int], users: int) -> None:
        self.depth = 1
        self.top = top
        self.users = users
        self.parameters: list[Swapped] = []
        self.buffers: list[SwappedBuffer] = []
        self.rows: list[int] | None = None

    def check_views(self, users: Callable[[], int], returned: int, names: Iterable[str]) -> None:
        """Raises if more users of the scratch memory are left than before the module ran, and ``returned``.

        Threads of torch.distributed let go of a tensor a moment after its collective is done.
        """
        end = time.monotonic() + GRACE
        while users() > self.users + returned:
            if time.monotonic() < end:
                time.sleep(GRACE / 1000)
                continue
            raise StreamedProbeError(
                f"streamed probe: a view of {', '.join(names) or 'a buffer'} outlives the forward of the "
                "module that owns it, and would later show other weights. Pass probe='inplace', or keep a "
                "copy instead of a view."
            )


def check_no_transform() -> None:
    """Raises within a transform of torch.func, whose tensors do not show weights that are swapped."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise StreamedProbeError(
            "streamed probe: the closure runs the model inside a transform of torch.func (grad, vmap, jvp, "
            "...), which does not see swapped weights. Pass probe='inplace', or use torch.autograd.grad"
        )
