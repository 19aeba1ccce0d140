"""Refuses closures that write to weights, such as those that merge adapters and unmerge them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

from zoext._parameters import shards
from zoext._runtime.compiled import runs_compiled, uncompiled
from zoext.probes._hooks import Hook
from zoext.probes._memory import interval_of, storage_of


class WeightWriteError(RuntimeError):
    """The closure writes to a weight."""


class _Weight(NamedTuple):
    module: nn.Module
    holders: list[nn.Module]  # the module and those that contain it
    name: str  # in the module
    parameter: nn.Parameter
    data: Tensor
    start: int  # address; 0 if it has none
    end: int


#: The weight in whose displaced copy a tensor lies; None if it lies elsewhere.
DisplacedAt = Callable[[Tensor], Tensor | None]


@contextmanager
def refused(root: nn.Module, displaced_at: DisplacedAt = lambda tensor: None) -> Iterator[_Writes]:
    """A block in which a write to a weight of ``root``, or to a displaced copy, raises before it happens.

    A module may write to frozen weights in it while it runs, as layers do that set themselves up in their
    first forward, and wrappers that parametrize what they wrap. Weights that the closure has replaced when
    the block raises are put back.

    Raises:
        WeightWriteError: for a write, and for a weight that was replaced when its module begins to run.
    """
    running: Counter[nn.Module] = Counter()
    found: list[_Weight] = []
    weights = list(_weights_of(root))
    by_module: dict[nn.Module, list[_Weight]] = {}
    for weight in weights:
        by_module.setdefault(weight.module, []).append(weight)

    def before(module: nn.Module, args: Any) -> None:
        running[module] += 1
        for weight in by_module.get(module, ()) if running[module] == 1 else ():
            if _was_replaced(weight):
                found.append(weight)
                raise _error(root, weight, "replaces")

    def after(module: nn.Module, args: Any, output: Any) -> None:
        running[module] -= 1
        if module in by_module and not found:  # what it has replaced itself is not watched any more
            by_module[module] = [weight for weight in by_module[module] if not _was_replaced(weight)]

    handles: list[RemovableHandle] = []
    try:
        # Not hooks on all modules at once, of which torch.compile warns.
        for module in dict.fromkeys(holder for weight in weights for holder in weight.holders):
            handles.append(module.register_forward_pre_hook(Hook(before), prepend=True))
            handles.append(module.register_forward_hook(Hook(after), always_call=True))
        with uncompiled(), _Writes(root, weights, running, displaced_at) as writes:
            yield writes
    except WeightWriteError:
        for weight in chain.from_iterable(by_module.values()):
            if _was_replaced(weight):
                weight.module._parameters[weight.name] = weight.parameter
                weight.parameter.data = weight.data
        raise
    finally:
        for handle in handles:
            handle.remove()


class _Writes(TorchDispatchMode):
    """Raises before an operator writes to a weight while no module that contains it is running."""

    supports_higher_order_operators = True  # such as flex_attention; they write to none of their arguments

    def __init__(
        self,
        root: nn.Module,
        weights: Iterable[_Weight],
        running: Counter[nn.Module],
        displaced_at: DisplacedAt,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran_uncompiled = False
        self._root = root
        self._running = running
        self._displaced_at = displaced_at
        self._weights: dict[int, list[_Weight]] = {}
        self._trains = {id(weight.parameter): weight for weight in weights if weight.parameter.requires_grad}
        for weight in weights:
            if weight.start:
                self._weights.setdefault(storage_of(weight.data), []).append(weight)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        run: Callable[..., Any] = func
        self.ran_uncompiled = self.ran_uncompiled or runs_compiled()
        if func.namespace != "zoext":
            for position, name in _written_arguments(func):
                value = args[position] if position < len(args) else (kwargs or {}).get(name)
                for tensor in tree_iter(value):
                    if isinstance(tensor, Tensor):
                        self._check(tensor, func)
        return run(*args, **(kwargs or {}))

    def _check(self, tensor: Tensor, func: Any) -> None:
        start, end = interval_of(tensor)
        known = self._weights.get(storage_of(tensor), ()) if start else ()
        written = [weight for weight in known if start < weight.end and weight.start < end]
        if written and not any(self._running[holder] for weight in written for holder in weight.holders):
            raise _error(self._root, written[0], "writes to")
        trained = next((weight for weight in written if weight.parameter.requires_grad), None)
        # To a displaced copy, which a streamed probe throws away. This one may be repeated.
        if trained is None and func is not torch.ops.aten.embedding_renorm_.default:
            trained = self._trains.get(id(self._displaced_at(tensor)))
        if trained is not None:
            raise _displaced_error(self._root, trained)


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(func, "_schema", None)
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments if schema is not None else ())
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _weights_of(root: nn.Module) -> Iterator[_Weight]:
    holders: dict[nn.Module, list[nn.Module]] = {}
    for holder in root.modules():
        for module in holder.modules():
            holders.setdefault(module, []).append(holder)
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, parameter in dict(module._parameters).items():
            # Offloaded and sharded ones are often replaced.
            if parameter is not None and not parameter.is_meta and not shards.is_distributed(parameter):
                data = parameter.data
                yield _Weight(module, holders[module], name, parameter, data, *interval_of(data))


def _was_replaced(weight: _Weight) -> bool:
    now = weight.module._parameters.get(weight.name)
    # Trainable weights are swapped by streamed probes, and the engine checks them. functional_call lends
    # modules tensors that are no parameters.
    if weight.parameter.requires_grad or not isinstance(now, nn.Parameter):
        return False
    return now is not weight.parameter or interval_of(now.data)[0] != weight.start


def _error(root: nn.Module, weight: _Weight, how: str) -> WeightWriteError:
    put_back = ". It is put back; load adapters again that count as merged now" if how == "replaces" else ""
    return WeightWriteError(
        f"closure {how} {_name_of(weight, root)}, a weight of the model: probes would see different weights, "
        "and the change would outlast the step. Run adapters unmerged, without merge_adapter() and "
        "unmerge_adapter(), which gives the same loss; update weights, such as those of an EMA, between "
        f"steps{put_back}"
    )


def _displaced_error(root: nn.Module, weight: _Weight) -> WeightWriteError:
    return WeightWriteError(
        f"closure writes to {_name_of(weight, root)} in a forward, while it is displaced: the write would be "
        "lost or keep a part of the displacement. If the model sets itself up in its first forward, run it "
        "once before the first step; otherwise freeze the weight with requires_grad_(False). For "
        "nn.Embedding, set max_norm=None"
    )


def _name_of(weight: _Weight, root: nn.Module) -> str:
    prefix = next((name for name, module in root.named_modules() if module is weight.module), "")
    return f"{prefix}.{weight.name}" if prefix else weight.name
