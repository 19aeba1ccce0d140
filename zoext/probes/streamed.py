"""A probe that displaces a module's weights while the module runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._runtime import interrupts
from zoext._runtime.compiled import runs_compiled, uncompiled
from zoext._runtime.profiling import Phase, record
from zoext.directions import Combination
from zoext.probes._memory import interval_of, storage_of
from zoext.probes._running import StreamedProbeError
from zoext.probes._swap import ModuleSwap
from zoext.probes._writes import refused
from zoext.probes.base import Probe, Session, is_watched_session

#: Assigning ``tensor.data`` calls this, through the dispatcher in inference mode; it reads no values.
_ASSIGNS_DATA = torch.ops.aten._has_compatible_shallow_copy_type.default


class StreamedProbe(Probe):
    """Swaps each module's own weights for displaced ones while that module runs.

    Theta is never written to, so it keeps every bit. Buffers that a module writes to, such as running
    statistics, change once an estimate: as in the forward at theta, or else in the first one. The displaced
    weights are stored in a scratch buffer as large as the largest module's weights.

    A weight that is read outside its module's ``forward`` is displaced until the closure ends, in memory of
    its own; ``describe`` names these. An alias of it that was made before the closure began, such as
    ``weight.detach()``, cannot be displaced: the first probe watches every operator and raises at such a
    read, and later ones watch again whenever a different set of modules runs.

    Sharded models (DTensor): while a probe runs, FSDP2 gathers displaced copies of this rank's shards, cast
    as its policy says, and the shards are never written to. The scratch buffer is then as large as the
    largest group's shards. Other DTensors are displaced while their modules run. Reads of a DTensor outside
    its module's ``forward`` are found by probes that watch, and not by others.

    Args:
        module: the model.

    Raises:
        TypeError: if a part of it is compiled by ``torch.jit``.
    """

    is_exact = True
    displaces_held = True

    def __init__(self, module: nn.Module) -> None:
        for name, part in module.named_modules():
            has_tensors = part._parameters or part._buffers
            if has_tensors and isinstance(part, torch.jit.RecursiveScriptModule):  # type: ignore[attr-defined]
                raise TypeError(
                    f"streamed probe: {name or 'the module'} is compiled by torch.jit, which runs no hooks; "
                    "pass probe='inplace'"
                )
        self.module = module
        self._swap = ModuleSwap(module)
        self._watched: set[tuple[frozenset[int], tuple[tuple[int, bool], ...]]] = set()
        self._seen: set[int] = set()  # modules that ran in watched probes
        self._watch_next = True
        self._is_stale = False
        self._ran_uncompiled = False
        self._is_repetition = False
        self._sessions = 0
        self._has_displaced = False
        self._is_compiled = False  # a part of what the closure runs

    def __getstate__(self) -> dict[str, Any]:
        """Only the module; everything else is recomputed."""
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])  # type: ignore[misc]

    def describe(self) -> str:
        how = (
            "streamed: each weight is displaced while the module that owns it runs, and restored bit for bit"
        )
        if not (names := self._swap.outside):
            return how
        return f"{how}; until the closure ends, since they are read elsewhere: {', '.join(names)}"

    @property
    def is_to_watch(self) -> bool:
        return self._watch_next

    @contextmanager
    def captured(self) -> Iterator[list[Tensor]]:
        memory: list[Tensor] = []
        self._watch_next = False
        with self.unwatched():
            yield memory
        if self._watch_next:
            raise StreamedProbeError(
                "streamed probe: other modules ran while the step was captured than in the steps before, so "
                "their weight reads are unchecked. Run the same modules at every step, or pass "
                "probe='inplace'"
            )
        memory.extend(self._swap.memory)

    @contextmanager
    def session(self) -> Iterator[Session]:
        if not self._unwatched:
            self._sessions += 1
            self._watch_next = self._watch_next or is_watched_session(self._sessions)
        # In the first session, compiled code would have shown. It must not be compiled again for other hooks.
        find_groups = (
            self._watch_next and self._sessions > 1 and not self._unwatched and not self._is_compiled
        )
        with interrupts.deferred() as signals, self._swap.hooked(signals, find_groups):
            try:
                yield _StreamedSession(signals, self._displaced, self._swap.take_buffers, self._was_stale)
            finally:
                torch.clear_autocast_cache()

    @contextmanager
    def _displaced(self, combination: Combination, keep_buffers: bool) -> Iterator[None]:
        modes = self._swap.modes()
        unknown = self._watch_next or all(modes != known for _, known in self._watched)
        watch = unknown and not self._unwatched
        watching = _watching(combination, self._swap) if watch and len(combination) else nullcontext()
        # A probe at theta that ran uncompiled for the watch's sake is repeated without it.
        repeats_centre, self._is_repetition = self._is_repetition and not len(combination), False
        with (
            refused(self.module, self._swap.displaced_at)
            if watch and not repeats_centre
            else nullcontext() as writes,
            self._swap.displaced(combination, watch, keep_buffers) as visited,
            watching as reads,
            record(Phase.FORWARD),
        ):
            torch.clear_autocast_cache()
            yield
        if not len(combination):
            self._ran_uncompiled = writes is not None and writes.ran_uncompiled
        else:
            self._check_displaced(visited, combination)
            route = (frozenset(visited), modes)
            if watch:
                self._watched.add(route)
                self._seen |= visited
            is_unseen = not self._unwatched and not visited & self._swap.opening() <= self._seen
            self._is_stale = is_unseen or (reads is not None and reads.found_alias)
            # Compiled code ran as it is written: its loss must not be compared with those of other probes.
            self._ran_uncompiled = reads is not None and reads.ran_uncompiled
            if self._ran_uncompiled and not self._is_compiled:
                self._is_compiled = True
                self._swap.forget_groups()
            # A new route that ran unwatched is watched at the next probe.
            unwatched = route not in self._watched or self._is_stale
            self._watch_next = unwatched or (self._unwatched and self._watch_next)

    def _was_stale(self) -> bool:
        was_stale = self._is_stale or self._ran_uncompiled
        self._is_repetition = self._ran_uncompiled
        self._is_stale = self._ran_uncompiled = False
        return was_stale

    def _check_displaced(self, visited: set[int], combination: Combination) -> None:
        """Raises if no probe has displaced a weight yet. Later probes may: parts of a model may rest."""
        ran = bool(self._swap.outside) or not self._swap.own_weights().isdisjoint(visited)
        self._has_displaced = self._has_displaced or ran
        if not self._has_displaced:
            names = [name for parameters, _ in combination.terms for name in parameters.names]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise StreamedProbeError(
                f"streamed probe: the closure ran no module that owns a weight of the optimizer ({shown}), "
                "so nothing was displaced. Have it run that model itself, not a copy, with adapters neither "
                "merged nor disabled"
            )


class _StreamedSession(Session):
    def __init__(
        self,
        signals: interrupts.Signals,
        displaced: Callable[[Combination, bool], AbstractContextManager[None]],
        take_buffers: Callable[[], Callable[[Tensor], None]],
        is_to_repeat: Callable[[], bool],
    ) -> None:
        super().__init__(signals)
        self._displace = displaced
        self._take_buffers = take_buffers
        self._is_to_repeat = is_to_repeat

    def displaced(self, combination: Combination, keep_buffers: bool = False) -> AbstractContextManager[None]:
        return self._displace(combination, keep_buffers)

    def is_to_repeat(self) -> bool:
        return self._is_to_repeat()

    def take_buffers(self) -> Callable[[Tensor], None]:
        return self._take_buffers()


@contextmanager
def _watching(combination: Combination, swap: ModuleSwap) -> Iterator[_ReadsOutside]:
    reads = _ReadsOutside((parameters for parameters, _ in combination.terms), swap)
    with uncompiled(), reads:  # below a dispatch mode Dynamo would give up compiled frames for good
        yield reads
    if reads.names:
        names = ", ".join(sorted(reads.names))
        raise StreamedProbeError(
            f"streamed probe: an alias of {names}, made before the closure began, was read while the module "
            "that owns it was not running, so the probe would not have moved it. Have the closure read the "
            "parameter itself, or pass probe='inplace'"
        )


class _ReadsOutside(TorchDispatchMode):
    """Finds operators with an argument in the memory of the original weights.

    While a module runs, its parameters point to other memory, so such an operator is about to read a weight
    that is not displaced. If the argument is the parameter itself, it is displaced then, until the probe
    ends, so that the operator reads the displaced values. zoext's own operators are exempt: they read the
    originals to displace them.

    Attributes:
        found_alias: whether an alias of a weight was read, such as its ``data``, which does not follow.
        names: weights that an alias of them was read of although they had been displaced before.
        ran_uncompiled: whether compiled code ran, as it is written.
    """

    supports_higher_order_operators = True  # such as flex_attention

    def __init__(self, groups: Iterable[Parameters], swap: ModuleSwap) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.found_alias = False
        self.ran_uncompiled = False
        self._swap = swap
        self._held = swap.held  # since the probe began
        self._originals: dict[int, list[tuple[int, int, str, Tensor]]] = {}
        for parameters in groups:
            for parameter, name in zip(parameters.owners, parameters.names, strict=True):
                original = swap.originals[id(parameter)]
                start, end = interval_of(original)
                storage = storage_of(original)
                if not original.numel():  # a rank without a part: it must find what the others find
                    start, end = storage, storage + 1
                self._originals.setdefault(storage, []).append((start, end, name, parameter))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        run: Callable[..., Any] = func
        self.ran_uncompiled = self.ran_uncompiled or runs_compiled()
        if func.namespace != "zoext" and func is not _ASSIGNS_DATA and not self._swap.is_displacing:
            for value in tree_iter((args, kwargs)):
                if isinstance(value, Tensor):
                    self._note(value)
        return run(*args, **(kwargs or {}))

    def _note(self, value: Tensor) -> None:
        tensor = shards.local_of(value)
        storage = storage_of(tensor)
        for start, end, name, parameter in self._originals.get(storage, ()) if storage else ():
            address = tensor.data_ptr() or storage  # tensors without elements have none
            if start <= address < end and self._begins_in(tensor, parameter):
                if value is not parameter and tensor is not shards.local_of(parameter):
                    if id(parameter) in self._held:
                        self.names.add(name)
                    self.found_alias = True
                self._swap.hold(parameter)

    def _begins_in(self, tensor: Tensor, parameter: Tensor) -> bool:
        """Whether the first element is one of the weight, whose rows another weight may lie between."""
        original = self._swap.originals[id(parameter)]
        offset = (tensor.data_ptr() - original.data_ptr()) // original.element_size()
        for stride, size in sorted(zip(original.stride(), original.shape, strict=True), reverse=True):
            if size > 1:
                offset -= min(offset // stride, size - 1) * stride
        return offset == 0
