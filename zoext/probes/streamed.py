"""A probe that displaces a module's weights while the module runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zoext._parameters.parameters import Parameters
from zoext._runtime import interrupts
from zoext._runtime.profiling import Phase, record
from zoext.directions import Combination
from zoext.probes._swap import ModuleSwap, StreamedProbeError
from zoext.probes.base import Probe, Session

#: Assigning ``tensor.data`` calls this, through the dispatcher in inference mode; it reads no values.
_ASSIGNS_DATA = torch.ops.aten._has_compatible_shallow_copy_type.default


class StreamedProbe(Probe):
    """Swaps each module's own weights for displaced ones while that module runs.

    Theta is never written to, so it keeps every bit. Buffers that a module writes to, such as running
    statistics, change once an estimate: as in the forward at theta, or else in the first one. The displaced
    weights are stored in a scratch buffer as large as the
    largest module's weights.

    A module must read its weights inside its own ``forward``. The first probe checks this for every operator,
    and the check is repeated whenever a different set of modules runs. A weight that is read elsewhere raises
    a RuntimeError that names the weight, before theta is moved.
    """

    is_exact = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._swap = ModuleSwap(module)
        self._watched: set[tuple[frozenset[int], tuple[tuple[int, bool], ...]]] = set()
        self._watch_next = True
        self._sessions = 0
        self._unwatched = False
        self._has_displaced = False

    def __getstate__(self) -> dict[str, Any]:
        """Only the module; everything else is recomputed."""
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])  # type: ignore[misc]

    @property
    def is_to_watch(self) -> bool:
        return self._watch_next

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        self._unwatched = True
        try:
            yield
        finally:
            self._unwatched = False

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
        memory.append(self._swap.memory)

    @contextmanager
    def session(self) -> Iterator[Session]:
        if not self._unwatched:
            self._sessions += 1
            if self._sessions & (self._sessions - 1) == 0 or self._sessions % 100 == 0:
                self._watch_next = True
        with interrupts.deferred() as signals, self._swap.hooked(signals):
            try:
                yield _StreamedSession(signals, self._displaced, self._swap.write_buffers)
            finally:
                torch.clear_autocast_cache()

    @contextmanager
    def _displaced(self, combination: Combination, keep_buffers: bool) -> Iterator[None]:
        modes = self._swap.modes()
        unknown = self._watch_next or all(modes != known for _, known in self._watched)
        watch = unknown and not self._unwatched
        watching = _watching(combination) if watch and len(combination) else nullcontext()
        with (
            self._swap.displaced(combination, watch, keep_buffers) as visited,
            watching,
            record(Phase.FORWARD),
        ):
            torch.clear_autocast_cache()
            yield
        if len(combination):
            self._check_displaced(visited, combination)
            route = (frozenset(visited), modes)
            if watch:
                self._watched.add(route)
            # A new route that ran unwatched is watched at the next probe.
            unwatched = route not in self._watched
            self._watch_next = unwatched or (self._unwatched and self._watch_next)

    def _check_displaced(self, visited: set[int], combination: Combination) -> None:
        """Raises if no probe has displaced a weight yet. Later probes may: parts of a model may rest."""
        self._has_displaced = self._has_displaced or not self._swap.own_weights().isdisjoint(visited)
        if not self._has_displaced:
            names = [name for parameters, _ in combination.terms for name in parameters.names]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise StreamedProbeError(
                f"streamed probe: the closure ran no module that owns a weight of the optimizer ({shown}), "
                "so nothing was displaced. Have it run that model, not another one or a copy, and no adapter "
                "that is merged or disabled"
            )


class _StreamedSession(Session):
    def __init__(
        self,
        signals: interrupts.Signals,
        displaced: Callable[[Combination, bool], AbstractContextManager[None]],
        write_buffers: Callable[[Tensor], None],
    ) -> None:
        super().__init__(signals)
        self._displace = displaced
        self._write_buffers = write_buffers

    def displaced(self, combination: Combination, keep_buffers: bool = False) -> AbstractContextManager[None]:
        return self._displace(combination, keep_buffers)

    def write_buffers(self, condition: Tensor) -> None:
        self._write_buffers(condition)


@contextmanager
def _watching(combination: Combination) -> Iterator[None]:
    reads = _UnperturbedReads(parameters for parameters, _ in combination.terms)
    with reads:
        yield
    if reads.names:
        names = ", ".join(sorted(reads.names))
        raise StreamedProbeError(
            f"streamed probe: {names} was read while the module that owns it was not "
            "running, so the probe would not have moved it. Pass probe='inplace', or have the model "
            "call that module instead of reading its weights."
        )


class _UnperturbedReads(TorchDispatchMode):
    """Checks whether an argument of any operator lies in the memory of the original weights.

    While a module runs, its parameters point to the scratch buffer, so an operator that reads the original
    memory reads an unperturbed weight. zoext's own operators are exempt, because they fill the scratch
    buffer.
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
