"""Sees that a weight is read while the module that owns it does not run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

#: Properties of tensors that show no values.
_PROPERTIES = (
    "device",
    "dtype",
    "grad",
    "grad_fn",
    "is_cpu",
    "is_cuda",
    "is_leaf",
    "is_meta",
    "is_mkldnn",
    "is_mps",
    "is_nested",
    "is_quantized",
    "is_sparse",
    "is_sparse_csr",
    "is_xpu",
    "itemsize",
    "layout",
    "name",
    "names",
    "nbytes",
    "ndim",
    "output_nr",
    "requires_grad",
    "retains_grad",
    "shape",
    "_backward_hooks",
    "_base",
    "_grad",
    "_post_accumulate_grad_hooks",
    "_version",
)
#: Methods and functions that read no values of their tensors.
_METHODS = (
    "__hash__",
    "__len__",
    "dim",
    "dim_order",
    "element_size",
    "get_device",
    "has_names",
    "is_complex",
    "is_conj",
    "is_contiguous",
    "is_floating_point",
    "is_inference",
    "is_neg",
    "is_pinned",
    "is_same_size",
    "is_shared",
    "is_signed",
    "ndimension",
    "nelement",
    "new_empty",
    "new_full",
    "new_ones",
    "new_tensor",
    "new_zeros",
    "numel",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "requires_grad_",
    "size",
    "storage_offset",
    "stride",
    "_is_view",
)
_FUNCTIONS = (
    "empty_like",
    "full_like",
    "is_complex",
    "is_conj",
    "is_floating_point",
    "is_inference",
    "is_neg",
    "is_same_size",
    "is_signed",
    "numel",
    "ones_like",
    "rand_like",
    "randn_like",
    "zeros_like",
)
#: Methods that read values of their first argument only.
_LIKE = ("expand_as", "reshape_as", "to", "type_as", "view_as")


def _known(owner: Any, names: Iterable[str]) -> list[Any]:
    """Those that this version of torch has."""
    return [getattr(owner, name) for name in names if hasattr(owner, name)]


_READS_NOTHING = frozenset(
    [
        access
        for found in _known(Tensor, _PROPERTIES)
        for access in (found.__get__, found.__set__, found.__delete__)
    ]
    + _known(Tensor, _METHODS)
    + _known(torch, _FUNCTIONS)
)
_SETS_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_READS_FIRST = frozenset(_known(Tensor, _LIKE))


def reads_nothing(function: Any) -> bool:
    """Whether a function of torch reads no values of its tensors."""
    return function in _READS_NOTHING


class ReadGuard:
    """Calls ``read`` before a function of torch reads a guarded tensor, however its caller got hold of it.

    The class of a guarded tensor is one with ``__torch_function__``. It costs two assignments for each time
    that a module runs, where a look at every operator costs as much as many operators. Functions of other
    threads are not seen, and neither is code that reads tensors without functions of torch.
    """

    def __init__(self, read: Callable[[Tensor], None]) -> None:
        self._read = read
        self._thread = 0
        self._guarded: dict[type, type] = {}  # the class with which tensors of a class are guarded
        self._own: dict[type, type] = {}  # the reverse

    def begin(self, tensors: Iterable[Tensor]) -> None:
        """Guards tensors against reads of this thread. All must be released again."""
        self._thread = threading.get_ident()
        self.guard(tensors)

    def guard(self, tensors: Iterable[Tensor]) -> None:
        """Guards tensors again that were released."""
        known = self._guarded
        for tensor in tensors:
            kind = type(tensor)
            tensor.__class__ = known[kind] if kind in known else self._guarded_class(kind)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors their own class again."""
        own = self._own
        for tensor in tensors:
            kind = type(tensor)
            if kind in own:
                tensor.__class__ = own[kind]

    def read(self, tensor: Tensor) -> None:
        """Handles that a tensor is about to be read, which releases it."""
        if type(tensor) in self._own and threading.get_ident() == self._thread:
            self.release([tensor])
            self._read(tensor)

    def _guarded_class(self, kind: type) -> type:
        guarded = kind
        # Others have functions of their own, as those that see reads for another optimizer.
        if issubclass(kind, nn.Parameter) and kind.__torch_function__ is nn.Parameter.__torch_function__:
            # Dynamo would trace it, and the displacement with it.
            run: Any = classmethod(torch.compiler.disable(_run))
            members = {"_guard": self, "_own": kind, "__torch_function__": run}
            metaclass: Any = type(kind)
            guarded = metaclass(kind.__name__, (_Guarded, kind), members)
            self._own[guarded] = kind
        self._guarded[kind] = self._guarded[guarded] = guarded
        return guarded


def _run(cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
    """The ``__torch_function__`` of guarded tensors."""
    kwargs = kwargs or {}
    if func == _SETS_DATA and isinstance(args[0], _Guarded):
        _release(args[0])  # not displaced, so that the engine finds it elsewhere
    if func not in _READS_NOTHING:
        for value in tree_iter(args[:1] if func in _READS_FIRST else (args, kwargs)):
            if isinstance(value, _Guarded):
                _note(value)
        if not any(isinstance(value, _Guarded) for value in tree_iter((args, kwargs))):
            return func(*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _note(tensor: _Guarded) -> None:
    tensor._guard.read(tensor)  # type: ignore[arg-type]


def _release(tensor: _Guarded) -> None:
    tensor._guard.release([tensor])  # type: ignore[list-item]


class _Guarded:
    """A base of guarded classes, before the own one. What is made of a guarded tensor has the own one."""

    _guard: ClassVar[ReadGuard]
    _own: ClassVar[type]

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return cls._own(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own = self._own
        self._guard.read(self)  # type: ignore[arg-type]
        return own.__deepcopy__(self, memo)  # type: ignore[attr-defined]
