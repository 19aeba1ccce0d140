"""A whole step in a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from zoext import interrupts
from zoext.capturable import HostWaits
from zoext.closures import Bindings, capturable
from zoext.estimators import Estimate
from zoext.probes import is_compiled
from zoext.updates import State

if TYPE_CHECKING:
    from zoext.optimizer import ZerothOrderOptimizer

T = TypeVar("T")

_PLAIN = {int, float, bool, str, type(None)}

#: Steps without a graph before one is captured, as torch does: what is initialised late is then in place.
WARM_UP = 3


class GraphedStep:
    """``optimizer.step(closure)`` from a CUDA graph: one launch and a few small copies, the same bits.

    The first steps run as ever, until nothing but numbers differs from one to the next (three, and for
    AdaMeZO as many more as its window has). Then a step is captured, with its forwards, its estimate and
    its update, for which the host waits once, and replayed from there on. What the host decides anew for
    every step (seeds, learning rates, the window of AdaMeZO) is written to the graph's memory before each
    replay. Where the parameters, ``mu``, ``weight_decay``, the train and eval modes of the optimizer's module
    or the memory of any of its weights and buffers changed, the graph is dropped, and steps run as ever
    until there is another one.

    The batch is read from tensors that the caller overwrites in place, as with ``torch.cuda.graph``:

        x, y = torch.empty(8, 512, device="cuda"), torch.empty(8, dtype=torch.long, device="cuda")
        step = zoext.GraphedStep(optimizer, lambda: cross_entropy(model(x), y))
        for new_x, new_y in loader:
            x.copy_(new_x, non_blocking=True)
            y.copy_(new_y, non_blocking=True)
            loss = step()
            scheduler.step()

    Steps with and without it can be mixed, checkpoints are the same, and the hooks of the optimizer run at
    every step. A model that asks whether it is captured, and takes other kernels then, has other bits then.

    Args:
        optimizer: any of zoext, with its parameters on a CUDA device.
        closure: as for ``optimizer.step``, but its Python code does not run again at a replay: it must
            return a tensor on the device of the parameters, wait for nothing on the device and draw no
            random numbers (dropout). Its variables are watched; what it reads through other functions and
            torch's modes (autocast, precision) are those of the capture, unseen.

    Raises:
        ValueError: for parameters that are not on a CUDA device.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer, closure: Callable[[], Tensor]) -> None:
        self._optimizer = optimizer
        self._closure = closure
        given = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        self._device = next((tensor.device for tensor in given if tensor.requires_grad), torch.device("cpu"))
        CudaGraph(self._device)
        self._fixed: Any = None
        self._alike = 0
        self._recorded: _Recorded | None = None

    def __call__(self) -> Tensor:
        """Moves theta by one step.

        Returns:
            The mean of the losses evaluated, float32 [], on the device of the parameters.

        Raises:
            RuntimeError: for a closure that cannot be captured, or whose tensors were replaced instead of
                overwritten. Theta was not moved.
            TypeError: for a closure that returns anything but a tensor on the device.
            FloatingPointError: as ``optimizer.step``.
        """
        return self._optimizer.step(self)

    def _advance(self, optimizer: ZerothOrderOptimizer) -> Tensor:
        """The step itself; ``optimizer.step`` calls it between its hooks."""
        if optimizer is not self._optimizer:
            raise ValueError("closure must be a GraphedStep of this optimizer, not of another one")
        fixed = _fixed_by_a_graph(optimizer)
        if fixed != self._fixed:
            self._fixed, self._alike, self._recorded = fixed, 0, None
        if self._alike < WARM_UP:
            self._alike += 1
            return optimizer._step(capturable(self._closure, self._device))
        if self._recorded is None:
            self._recorded = self._record()
        return self._replay(self._recorded)

    def _record(self) -> _Recorded:
        optimizer = self._optimizer
        graph, inputs = CudaGraph(self._device), _Inputs.of(optimizer)
        # A compiled model does not run compiled where operators are watched.
        module = optimizer._module
        watching = nullcontext() if module is None or is_compiled(module) else HostWaits()  # type: ignore[no-untyped-call]

        def step() -> tuple[Estimate, list[State]]:
            with watching:
                return _step_on_the_device(optimizer, self._closure, inputs)

        with interrupts.deferred(), optimizer._estimation(), optimizer._probe.recorded() as memory:
            try:
                estimate, states = graph.capture(step)
            except Exception as error:
                raise RuntimeError(
                    f"the step cannot be captured in a CUDA graph, and nothing was changed: {error}. Keep "
                    "the closure's values on the device (no .item(), .tolist(), .cpu(), nonzero() or boolean "
                    "indexing, and no batch that comes from the host), or step with optimizer.step(closure)"
                ) from error
            finally:
                optimizer._frame = optimizer._frame_finite = None
        return _Recorded(graph, inputs, estimate, states, memory, Bindings(self._closure))

    def _replay(self, recorded: _Recorded) -> Tensor:
        if rebound := recorded.bindings.rebound():
            raise RuntimeError(
                f"closure: {', '.join(rebound)} is not what it was when the step was captured, and the graph "
                "still reads the old one. Overwrite tensors in place, as with x.copy_(new_x), or make a new "
                "GraphedStep"
            )
        optimizer = self._optimizer
        optimizer._pending.clear()
        with torch.inference_mode(False), torch.no_grad(), interrupts.deferred():
            recorded.inputs.fill(optimizer)
            optimizer._watch.check()  # last: it may wait for the step before
            recorded.graph.replay()
            # Autograd must see the change, or a stale saved tensor gives wrong gradients without an error.
            moved = chain.from_iterable(group.tensors for group in optimizer._groups)
            torch.autograd.graph.increment_version(tuple(moved))
            estimate, states = recorded.results(optimizer)
            optimizer._watch.note(estimate.finite)
            for group, state in zip(optimizer.param_groups, states, strict=True):
                group["update_state"] = state
            optimizer._finish_step(estimate)
        return estimate.loss


class CudaGraph:
    """What is captured once and replayed: launches with their addresses and numbers, and their memory."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"GraphedStep needs parameters on a CUDA device, not on {device}; move the model there, or "
                "step with optimizer.step(closure)"
            )
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, work: Callable[[], T]) -> T:
        """Records what ``work`` launches, and launches none of it."""
        self._graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(
            self._graph,
            stream=torch.cuda.Stream(self._device),
            capture_error_mode="thread_local",  # other threads may go on loading batches
        )
        # The outer context brings the stream back where ending a failed capture raises.
        with torch.cuda.stream(torch.cuda.current_stream(self._device)), capture:
            return work()

    def replay(self) -> None:
        assert self._graph is not None
        with torch.cuda.device(self._device):
            self._graph.replay()


class _Inputs(NamedTuple):
    """Where a graph reads what the host decides anew for every step."""

    seeds: Any
    lrs: list[Tensor]
    states: list[State]

    @classmethod
    def of(cls, optimizer: ZerothOrderOptimizer) -> _Inputs:
        groups = optimizer.param_groups
        device = next(group.device for group in optimizer._groups if len(group))
        return cls(
            optimizer._empty_seeds(device),
            # A float is a float64, or its product with the weight decay would be rounded otherwise.
            [torch.empty((), dtype=_lr_dtype(group), device=device) for group in groups],
            [_map(torch.empty_like, group["update_state"]) for group in groups],
        )

    def fill(self, optimizer: ZerothOrderOptimizer) -> None:
        optimizer._fill_seeds(self.seeds)
        for lr, group in zip(self.lrs, optimizer.param_groups, strict=True):
            lr.fill_(group["lr"])
        states = [group["update_state"] for group in optimizer.param_groups]
        if tensors := _tensors(self.states):
            torch._foreach_copy_(tensors, _tensors(states))


class _Recorded(NamedTuple):
    graph: CudaGraph
    inputs: _Inputs
    estimate: Estimate
    states: list[State]
    memory: list[Tensor]  # not ours, but read and written by the graph
    bindings: Bindings

    def results(self, optimizer: ZerothOrderOptimizer) -> tuple[Estimate, list[State]]:
        """The estimate and the new states of a replay, in memory that the next one does not overwrite."""
        before = _tensors([group["update_state"] for group in optimizer.param_groups])
        kept = {id(place): value for place, value in zip(_tensors(self.inputs.states), before, strict=True)}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                kept[id(tensor)] = tensor.clone()
            return kept[id(tensor)]

        fields = {field.name: getattr(self.estimate, field.name) for field in dataclasses.fields(Estimate)}
        return Estimate(**_map(keep, fields)), _map(keep, self.states)


def _step_on_the_device(
    optimizer: ZerothOrderOptimizer, closure: Callable[[], Tensor], inputs: _Inputs
) -> tuple[Estimate, list[State]]:
    estimate = optimizer._evaluate(closure, inputs.seeds, random=None)
    groups = zip(
        optimizer.param_groups,
        optimizer._groups,
        optimizer._mus,
        inputs.states,
        inputs.lrs,
        strict=True,
    )
    states = [
        optimizer._update(movable, mu, estimate, state, lr, group["weight_decay"])
        for group, movable, mu, state, lr in groups
    ]
    return estimate, states


def _fixed_by_a_graph(optimizer: ZerothOrderOptimizer) -> Any:
    """What a graph of a step holds as it was at the capture, as plain data."""
    places = [(group.keys, group.spans) for group in optimizer._current_groups()]
    options = [
        (group["mu"], group["weight_decay"], _lr_dtype(group), _map(_outline, group["update_state"]))
        for group in optimizer.param_groups
    ]
    memory = [_memory_of(group["params"]) for group in optimizer.param_groups]
    parts = optimizer._module.modules() if optimizer._module is not None else ()
    modules = [
        (id(part), part.training, _memory_of(part._parameters.values()), _memory_of(part._buffers.values()))
        for part in parts
    ]
    return places, options, memory, modules


def _memory_of(tensors: Iterable[Tensor | None]) -> list[Any]:
    return [tensor if tensor is None else (tensor.data_ptr(), *_outline(tensor)) for tensor in tensors]


def _outline(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _lr_dtype(group: dict[str, Any]) -> torch.dtype:
    lr = group["lr"]
    return lr.dtype if isinstance(lr, Tensor) else torch.float64


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Plain data with ``function`` of every tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(function, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        if _PLAIN.issuperset(map(type, value)):  # the keys of a step: hundreds, and looked at in vain
            return value
        entries = [_map(function, entry) for entry in value]
        return tuple(entries) if isinstance(value, tuple) else entries
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(found.append, value)
    return found
