"""Sees what weights are multiplied with, wherever the code is that multiplies them."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from zoext.directions._products import Product, Shown


class _Call(NamedTuple):
    """A call of a function of torch that takes tensors that show weights."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    watched: Sequence[tuple[Tensor, Shown]]


class ProductWatch(TorchFunctionMode):
    """Sees the functions of torch that weights, views of them and copies are passed to.

    They are recognized by identity and stay what they are, so that nothing of the watch remains in what a
    closure keeps of them. Only the thread that watches is seen.

    Args:
        weights: the parameters by their keys.
        note: called with each product.

    Attributes:
        read: the keys of the weights that were used otherwise than in a product, whether or not they were
            also used in one. Copies count, since they may be used where nothing sees it; saving does not.
    """

    def __init__(self, weights: Mapping[int, Tensor], note: Callable[[Product], None]) -> None:
        super().__init__()
        self._weights = weights
        self._note = note
        self._shown: dict[int, tuple[weakref.ref[Tensor], Shown]] = {}  # by the id of the tensor
        self.read: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches all weights within the block."""
        self.read.clear()
        for key, weight in self._weights.items():
            self._show(weight, Shown(weight, key, weight.detach()))
        depth = torch._C._len_torch_function_stack()
        torch._C._push_on_torch_function_stack(self)
        try:
            yield
        finally:
            # torch takes modes off the stack to call them; an interrupt may keep it from putting them back.
            while torch._C._len_torch_function_stack() > depth:
                torch._C._pop_torch_function_stack()
            self._shown.clear()

    def forget(self, key: int) -> None:
        """Ends watching a weight within the block."""
        if key in self._weights:
            self._shown.pop(id(self._weights[key]), None)

    def __torch_function__(
        self, func: Any, classes: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Nearly all calls end here, so that the watch costs little more than a mode that does nothing.
        shown = self._shown
        if type(func) in _PLAIN_FUNCTIONS:
            for value in args:
                if id(value) in shown or type(value) in _SEQUENCES:
                    break
            else:
                if not kwargs:
                    return func(*args)
                for value in kwargs.values():
                    if id(value) in shown or type(value) in _SEQUENCES:
                        break
                else:
                    return func(*args, **kwargs)
        kwargs = kwargs or {}
        watched: dict[int, tuple[Tensor, Shown]] = {}
        self._find(args, watched)
        self._find(kwargs.values(), watched)
        if isinstance(func, HigherOrderOperator):  # torch leaves the mode while it calls what it was given
            args, kwargs = tree_map(self._watched_function, (args, kwargs))
        result = func(*args, **kwargs)
        if watched:
            self._see(_Call(_name_of(func), func, args, kwargs, list(watched.values())), result)
        return result

    def _find(self, values: Iterable[Any], found: dict[int, tuple[Tensor, Shown]]) -> None:
        for value in values:
            if id(value) in self._shown:
                reference, shown = self._shown[id(value)]
                tensor = reference()
                if tensor is not None and tensor is value:  # not a later object at the same address
                    found[id(value)] = tensor, shown
            elif type(value) in _SEQUENCES:
                self._find(value, found)

    def _show(self, tensor: Tensor, shown: Shown) -> None:
        self._shown[id(tensor)] = weakref.ref(tensor), shown

    def _watched_function(self, value: Any) -> Any:
        if not callable(value) or isinstance(value, Tensor | nn.Module):
            return value

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return value(*args, **kwargs)

        return watched

    def _see(self, call: _Call, result: Any) -> None:
        if call.name in _PRODUCTS:
            self._see_product(call)
        elif call.name not in _NO_USE:
            results = _shown_by(call, result)
            if results is None or not all(_is_view(result, call.watched[0][0]) for result, _ in results):
                self.read.update(shown.key for _, shown in call.watched)
            for tensor, shown in results or ():
                self._show(tensor, shown)

    def _see_product(self, call: _Call) -> None:
        name = call.name
        tensors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
        first = _PRODUCTS[name]
        left, right, *others = tensors[first:] if len(tensors) > first + 1 else (None, None)
        if name == "__rmatmul__":
            left, right = right, left
        for tensor, shown in call.watched:
            products: list[Product] | None = None
            if tensor is right and left is not None:
                offsets = (
                    call.kwargs.get("offs", others[0] if others else None) if "grouped" in name else None
                )
                products = shown.products(-1 if name == "linear" else -2, left, offsets)
            elif tensor is left and right is not None and name != "linear" and "grouped" not in name:
                products = shown.products(-1, right.mT if right.dim() > 1 else right, None)
            if products is None:
                self.read.add(shown.key)
            for product in products or ():
                self._note(product)


def can_watch(parameter: Tensor) -> bool:
    """Whether uses of a parameter can be told: not if its class says what functions of torch do with it."""
    return type(parameter) is nn.Parameter


def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name == "__get__" else name.removesuffix(".default")


#: Of functions that call none of the functions that they are given.
_PLAIN_FUNCTIONS = frozenset(
    {
        types.BuiltinFunctionType,
        types.FunctionType,
        types.MethodDescriptorType,
        types.MethodWrapperType,
        types.WrapperDescriptorType,
    }
)
_SEQUENCES = frozenset({list, tuple})
#: Functions and attributes that tell nothing of a tensor's values, or save them.
_NO_USE = frozenset(
    """
    dtype device shape ndim layout requires_grad is_leaf grad grad_fn _version itemsize nbytes names is_cuda
    is_cpu is_meta is_sparse is_quantized is_nested is_xpu is_mps size dim numel nelement stride is_contiguous
    is_floating_point is_complex is_inference element_size storage_offset get_device __len__ __hash__
    is_same_size is_shared is_pinned requires_grad_ _is_view _base untyped_storage is_conj is_neg
    _backward_hooks _typed_storage __deepcopy__ __reduce_ex__
    """.split()  # noqa: SIM905
)
#: Functions that copy values to another dtype or memory, in the same shape.
_COPIES = frozenset(
    {"to", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "contiguous", "cpu", "cuda"}
)
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


def _shown_by(call: _Call, result: Any) -> list[tuple[Tensor, Shown]] | None:
    """The results that show the weight in turn; None if there are others, which have read it."""
    if len(call.watched) != 1:
        return None
    ((source, shown),) = call.watched
    if result is source:
        return []
    if call.name in _COPIES and isinstance(result, Tensor) and result.shape == source.shape:
        return [(result, shown)]
    if shown.entries is not None:
        return None
    if _is_view(result, source):
        views = result
        if not _is_view(source, shown.view):  # of a copy: the same view of the weight has other strides
            args, kwargs = tree_map(lambda value: shown.view if value is source else value, call[2:4])
            views = call.func(*args, **kwargs)
        pairs = [(result, views)] if isinstance(result, Tensor) else zip(result, views, strict=True)
        return [(part, Shown(shown.parameter, shown.key, view.detach())) for part, view in pairs]
    index = _index_of(call, source)
    if index is not None and isinstance(result, Tensor):
        return [(result, Shown(shown.parameter, shown.key, shown.view, index))]
    return None


def _is_view(result: Any, source: Tensor) -> bool:
    """Whether the result, or all in a list of results, share the memory of ``source``."""
    parts = result if type(result) in {list, tuple} else [result]
    return bool(parts) and all(
        isinstance(part, Tensor)
        and part.dtype == source.dtype
        and not torch._C._functorch.is_functorch_wrapped_tensor(part)
        and part.untyped_storage()._cdata == source.untyped_storage()._cdata
        for part in parts
    )


def _index_of(call: _Call, source: Tensor) -> Tensor | None:
    """The index of ``weight[index]`` or ``weight.index_select(0, index)`` of a stack."""
    name, args = call.name, call.args
    if source.dim() != 3 or args[0] is not source:
        return None
    index = args[1] if name == "__getitem__" else args[2] if name == "index_select" and args[1] == 0 else None
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in {torch.int32, torch.int64}:
        return None
    return index
