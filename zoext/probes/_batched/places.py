"""Where the copies of a batch lie in tensors: along which dimension, found by comparing the copies.

A batch of B examples that is repeated C times has its copies one after the other: along the first dimension
of most tensors, along the second of those that begin with positions. In a forward at theta all copies are
equal, so the dimension can be seen. A tensor that all copies share, such as positions, has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from zoext.probes._batched.errors import BatchedProbeError

#: What modules may take beside tensors: values that are the same for all copies.
_SHARED = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.memory_format)


_REMEDY = (
    "; pass use_cache=False to the model if it is a cache, or freeze the module's own "
    "weights with requires_grad_(False)"
)


def find(tensor: Tensor, copies: int, rows: int | None) -> int | None:
    """The dimension along which a tensor consists of ``copies`` equal parts; None if there is none.

    Among several it is the first whose size fits ``rows``, the examples of all copies. A tensor of zeros
    consists of equal parts along any dimension: where no size fits, it is one that all copies share.
    """
    if copies == 1 or not tensor.numel():
        return 0 if tensor.dim() else None
    dims = [dim for dim, size in enumerate(tensor.shape) if size % copies == 0]
    # Unseen by the modes that watch the forward, of whose operators these are none.
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        found = (dim for dim in dims if _is_repeated(front(tensor, dim), copies))
        if rows is None:
            return next(found, None)
        fitting = (dim for dim in dims if tensor.shape[dim] % rows == 0)
        for dim in fitting:
            if _is_repeated(front(tensor, dim), copies):
                return dim
        return next((dim for dim in found if not _is_constant(front(tensor, dim), copies)), None)


def without_doubtful(tensors: Sequence[Tensor], found: Sequence[int | None]) -> tuple[int | None, ...]:
    """The dimensions that were ``found``, with None for tensors that may only look like copies.

    These have a single entry along the dimension of the examples in the first tensor, and not as many along
    any other. The halves of rotary tables [1, positions, width] are equal, and packed examples look alike.
    """
    known = found[0] if found else None
    if known is None:
        return tuple(found)

    def is_doubtful(tensor: Tensor, dim: int) -> bool:
        has_one = tensor.dim() > known and tensor.shape[known] == 1
        return has_one and tensor.shape[dim] != tensors[0].shape[known]

    pairs = zip(tensors, found, strict=True)
    return tuple(None if dim is None or is_doubtful(tensor, dim) else dim for tensor, dim in pairs)


def are_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to what products round differently."""
    return one.shape == other.shape and (
        not one.numel() or _is_repeated(torch.stack((one.detach(), other.detach())), 2)
    )


def front(tensor: Tensor, dim: int) -> Tensor:
    """``tensor`` with dimension ``dim`` first."""
    return tensor if dim == 0 else tensor.movedim(dim, 0)


def back(tensor: Tensor, dim: int) -> Tensor:
    """The inverse of ``front``."""
    return tensor if dim == 0 else tensor.movedim(0, dim)


def _is_constant(tensor: Tensor, copies: int) -> bool:
    """Whether the first dimension may look repeated only because nothing differs along it."""
    first = tensor[:1] if len(tensor) > copies else tensor.flatten()[0]  # copies of one row are all equal
    return bool((tensor == first).all())


def _is_repeated(tensor: Tensor, copies: int) -> bool:
    parts = tensor.reshape(copies, -1)
    first, others = parts[:1], parts[1:]
    if bool((others == first).all()):
        return True
    if not tensor.is_floating_point():
        return False
    # Equal rows of a product may be rounded differently in different places of a matrix.
    tolerance = 1e-3 if tensor.dtype.itemsize > 2 else 3e-2
    is_finite = torch.isfinite(first)
    if not bool(((others == first) | is_finite | (others.isnan() & first.isnan())).all()):
        return False
    finite = torch.where(is_finite, first, 0.0)
    difference = torch.where(is_finite, others, 0.0) - finite
    return bool(difference.abs().max() <= tolerance * finite.abs().max())


class Leaves:
    """The tensors in the arguments or the output of a module, whose description ``what`` returns.

    Attributes:
        tensors: in the order of the structure.
        what: returns the description.
    """

    def __init__(self, structure: Any, what: Callable[[], str]) -> None:
        self.what = what
        self._leaves, self._spec = tree_flatten(structure)
        self._positions = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[i] for i in self._positions]
        for leaf in self._leaves:
            if not isinstance(leaf, (Tensor, *_SHARED)):
                raise BatchedProbeError(
                    f"{what()} has a {type(leaf).__name__}, which cannot be divided into copies{_REMEDY}"
                )

    def with_tensors(self, tensors: Sequence[Tensor]) -> Any:
        """The structure with other tensors."""
        leaves = list(self._leaves)
        for position, tensor in zip(self._positions, tensors, strict=True):
            leaves[position] = tensor
        return tree_unflatten(leaves, self._spec)

    def map(self, function: Callable[[Tensor, int | None], Tensor], dims: Sequence[int | None]) -> Any:
        """The structure with ``function(tensor, dim)`` of each tensor."""
        pairs = zip(self.tensors, dims, strict=True)
        return self.with_tensors([function(tensor, dim) for tensor, dim in pairs])


def part_of(tensor: Tensor, dim: int | None, *, copy: int, copies: int) -> Tensor:
    """The part of a copy; all of a tensor that the copies share."""
    return tensor if dim is None else tensor.chunk(copies, dim)[copy]


def joined(parts: Sequence[Any], dims: Sequence[int | None], what: Callable[[], str], examples: int) -> Any:
    """The output of all copies from that of each. One without copies is repeated for ``examples`` of each."""
    if len(parts) == 1:
        return parts[0]
    leaves = [Leaves(part, what) for part in parts]
    found = []
    for number, dim in enumerate(dims):
        tensors = [leaf.tensors[number] for leaf in leaves]
        if dim is None:
            if not tensors[0].dim():
                raise BatchedProbeError(f"{what()} has a number, which each copy would have of its own")
            tensors = [each[0] if len(each) == 1 else each for each in tensors]
            tensors, dim = [each.expand(examples, *each.shape) for each in tensors], 0
        found.append(torch.cat(tensors, dim))
    return leaves[0].with_tensors(found)
