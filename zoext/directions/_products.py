"""Sees the products of weights with activations, wherever the code is that multiplies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map


class Product(NamedTuple):
    """A matrix was multiplied with activations.

    Attributes:
        key: of the parameter.
        side: the factor that the activations determine: "right" if they are multiplied with the rows of the
            matrix as it is stored, "left" if with its columns.
        rows: the activations, [..., d].
        entries: the matrices of a stack that they were multiplied with; None if the parameter is a matrix.
        mask: bool [number of entries, *rows.shape[:-1]], which rows belong to each; None if all do.
    """

    key: int
    side: str
    rows: Tensor
    entries: Sequence[int] | None
    mask: Tensor | None


@dataclass(eq=False)
class WatchedWeight:
    """A parameter whose uses are seen while ``watching`` is entered.

    Attributes:
        is_read: whether it was used otherwise than in a product.
    """

    parameter: nn.Parameter
    key: int
    note: Callable[[Product], None]
    is_read: bool = False
    is_active: bool = field(default=False)

    def begin(self) -> None:
        values = self.parameter.detach()
        self.is_active = True
        self.parameter.__class__ = _Watched
        self.parameter.seen = _Derived(self, values)  # type: ignore[attr-defined]

    def end(self) -> None:
        """Ends watching; may be called again."""
        self.is_active = False
        if type(self.parameter) is _Watched:
            self.parameter.__class__ = nn.Parameter  # type: ignore[assignment]
            del self.parameter.seen


def can_watch(parameter: Tensor) -> TypeGuard[nn.Parameter]:
    """Whether uses of a parameter can be seen: not if its class has been changed by others."""
    return type(parameter) is nn.Parameter


@contextmanager
def watching(weights: Iterable[WatchedWeight]) -> Iterator[None]:
    """Watches weights within the block."""
    begun = []
    try:
        for weight in weights:
            begun.append(weight)
            weight.begin()
        yield
    finally:
        for weight in begun:
            weight.end()


class _Derived(NamedTuple):
    """Where values come from: a view of the weight that has their shape, or rows of such a view."""

    weight: WatchedWeight
    view: Tensor
    entries: Tensor | None = None  # int64 [S]: the entries of the stack that were gathered


class _Watched(nn.Parameter):
    """A parameter, or what was derived from it, that sees the functions of torch it is passed to."""

    seen: _Derived

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if name == "__iter__":
            return iter(torch.unbind(args[0]))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if name in _METADATA:
                return result
            watched = _watched_in((args, kwargs))
            if not watched:
                return result
            if name in _PRODUCTS:
                _note_product(name, args, kwargs, watched)
                return result
            return _derived(name, func, args, kwargs, watched, result)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        with torch._C.DisableTorchFunctionSubclass():
            copied = nn.Parameter(self.detach().clone(), self.requires_grad)
        memo[id(self)] = copied
        return copied


def _watched_in(values: Any) -> list[_Watched]:
    found = {id(value): value for value in tree_iter(values) if type(value) is _Watched}
    return [each for each in found.values() if "seen" in each.__dict__ and each.seen.weight.is_active]


def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name == "__get__" else name.removesuffix(".default")


#: Functions and attributes that tell nothing of a tensor's values.
_METADATA = frozenset(
    """
    dtype device shape ndim layout requires_grad is_leaf grad grad_fn _version itemsize nbytes names is_cuda
    is_cpu is_meta is_sparse is_quantized is_nested is_xpu is_mps size dim numel nelement stride is_contiguous
    is_floating_point is_complex is_inference element_size storage_offset get_device __len__ __hash__
    is_same_size is_shared is_pinned requires_grad_
    """.split()  # noqa: SIM905
)
#: Functions that copy values to another dtype or memory, in the same shape.
_COPIES = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "contiguous"})
#: The position of the left operand among the tensors that a product takes; the right one comes next.
_PRODUCTS = {
    "linear": 0,
    "matmul": 0,
    "__matmul__": 0,
    "__rmatmul__": 0,
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "baddbmm": 1,
    "_grouped_mm": 0,
    "grouped_mm": 0,
}


def _derived(
    name: str, func: Any, args: Any, kwargs: dict[str, Any], watched: Sequence[_Watched], result: Any
) -> Any:
    """The result of a function that is no product, which sees its uses in turn if it shows a weight."""
    if len(watched) == 1:
        (source,) = watched
        seen = source.seen
        if result is source:
            return result
        if name in _COPIES and isinstance(result, Tensor) and result.shape == source.shape:
            seen.weight.is_read = True  # the copy may be used where nothing sees it
            return _showing(result, seen)
        if seen.entries is None and _is_view(result, source):
            if _is_view(source, seen.view):
                view = result
            else:  # of a copy: the same view of the weight has other strides
                view = tree_map(lambda v: seen.view if v is source else v, (args, kwargs))
                view = func(*view[0], **view[1])
            if isinstance(result, Tensor):
                return _showing(result, seen._replace(view=view.detach()))
            pairs = zip(result, view, strict=True)
            return type(result)([_showing(a, seen._replace(view=b.detach())) for a, b in pairs])
        index = _gathered(name, args, source)
        if index is not None and isinstance(result, Tensor):
            seen.weight.is_read = True
            return _showing(result, seen._replace(entries=index))
    for each in watched:
        each.seen.weight.is_read = True
    return result


def _showing(value: Tensor, seen: _Derived) -> _Watched:
    shown = value.detach().as_subclass(_Watched)
    shown.seen = seen
    return shown


def _is_view(result: Any, source: Tensor) -> bool:
    """Whether the result, or all in a list of results, share the memory of ``source``."""
    parts = result if type(result) in (list, tuple) else [result]
    return bool(parts) and all(
        isinstance(part, Tensor)
        and part.dtype == source.dtype
        and part.untyped_storage()._cdata == source.untyped_storage()._cdata
        for part in parts
    )


def _gathered(name: str, args: Any, source: _Watched) -> Tensor | None:
    """The index of ``weight[index]`` or ``weight.index_select(0, index)`` of a stack."""
    if source.seen.entries is not None or source.dim() != 3 or args[0] is not source:
        return None
    index = args[1] if name == "__getitem__" else args[2] if name == "index_select" and args[1] == 0 else None
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in {torch.int32, torch.int64}:
        return None
    return index


def _note_product(name: str, args: Any, kwargs: dict[str, Any], watched: Sequence[_Watched]) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    first = _PRODUCTS[name]
    left, right, *others = tensors[first:] if len(tensors) > first + 1 else (None, None)
    if name == "__rmatmul__":
        left, right = right, left
    for each in watched:
        products: list[Product] | None = None
        if each is right and left is not None:
            offsets = kwargs.get("offs", others[0] if others else None) if "grouped" in name else None
            products = _products(each.seen, -1 if name == "linear" else -2, left, offsets)
        elif each is left and right is not None and name != "linear" and "grouped" not in name:
            products = _products(each.seen, -1, right.mT if right.dim() > 1 else right, None)
        if products is None:
            each.seen.weight.is_read = True
        else:
            for product in products:
                each.seen.weight.note(product)


def _products(seen: _Derived, dim: int, rows: Tensor, offsets: Tensor | None) -> list[Product] | None:
    """The products of the rows with what ``seen`` shows of a weight; None if they cannot be told.

    ``dim`` is the dimension of the weight that is summed over.
    """
    shape, view = seen.weight.parameter.shape, seen.view
    if rows.dim() == 1:
        rows = rows.unsqueeze(0)
    if view.dim() < 2 or not rows.is_floating_point() or rows.shape[-1] != view.shape[dim]:
        return None
    height, width = shape[-2:]
    if view.shape[dim] == width and view.stride(dim) == 1:
        side = "right"
    elif view.shape[dim] == height and view.stride(dim) == width:
        side = "left"
    else:  # a part of the matrix, which says nothing of the activations of the others
        return None
    rows = rows.detach()
    if isinstance(rows, _Watched):
        rows = rows.as_subclass(Tensor)

    def product(entries: Sequence[int] | None, of: Tensor, mask: Tensor | None = None) -> Product:
        return Product(seen.weight.key, side, of, entries, mask)

    if len(shape) == 2:
        return [product(None, rows)]
    first = (view.storage_offset() - seen.weight.parameter.storage_offset()) // (height * width)
    if seen.entries is not None:
        return _of_gathered(seen.entries, shape[0], rows, product) if first == 0 else None
    if view.dim() == 2:
        return [product([first], rows)]
    if view.dim() != 3 or (view.shape[0] > 1 and view.stride(0) != height * width):
        return None
    entries = range(first, first + view.shape[0])
    if offsets is not None:
        if rows.dim() != 2 or len(offsets) != len(entries):
            return None
        at = torch.arange(len(rows), device=rows.device)
        ends = offsets.to(at.dtype)
        begins = torch.cat((ends.new_zeros(1), ends[:-1]))
        return [product(entries, rows, (at >= begins[:, None]) & (at < ends[:, None]))]
    if rows.dim() == 2:
        return [product(entries, rows)]
    if rows.dim() == 3 and len(rows) == len(entries):
        return [product([entry], part) for entry, part in zip(entries, rows, strict=True)]
    return None


def _of_gathered(
    index: Tensor, count: int, rows: Tensor, product: Callable[..., Product]
) -> list[Product] | None:
    if rows.dim() != 3 or len(rows) != len(index):
        return None
    mask = index % count == torch.arange(count, device=index.device)[:, None]
    return [product(range(count), rows, mask[:, :, None].expand(-1, -1, rows.shape[1]))]
