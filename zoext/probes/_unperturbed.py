"""Finds weights that are read where a streamed probe has not replaced them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zoext._parameters.parameters import Parameters

#: What ``tensor.data = ...`` asks first, in inference mode through the dispatcher: no one reads there.
_ASSIGNS_DATA = torch.ops.aten._has_compatible_shallow_copy_type.default


class UnperturbedReads(TorchDispatchMode):
    """Watches every operator for arguments that lie in the memory of the original weights.

    While a module runs, its parameters point at the scratch buffer, so whatever still reads the
    original memory reads an unperturbed weight. zoext's own operators are exempt: they are what fills
    the scratch buffer.
    """

    def __init__(self, groups: Iterable[Parameters]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self._originals: dict[int, list[tuple[int, int, str]]] = {}
        for parameters in groups:
            for tensor, name in zip(parameters.tensors, parameters.names, strict=True):
                start = tensor.data_ptr()
                interval = (start, start + tensor.numel() * tensor.element_size(), name)
                self._originals.setdefault(tensor.untyped_storage().data_ptr(), []).append(interval)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        run: Callable[..., Any] = func
        if func.namespace != "zoext" and func is not _ASSIGNS_DATA:
            for value in tree_iter((args, kwargs)):
                if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
                    self._note(value)
        return run(*args, **(kwargs or {}))

    def _note(self, tensor: Tensor) -> None:
        for start, end, name in self._originals.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= tensor.data_ptr() < end:
                self.names.add(name)
