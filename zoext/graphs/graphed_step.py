"""A whole step in a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from zoext._engine.applied_step import TakenStep
from zoext._runtime import interrupts
from zoext.directions import Frame
from zoext.estimators import Estimate
from zoext.graphs._capturable import HostWaits, NotedHostWaits
from zoext.graphs._closures import Bindings, capturable
from zoext.graphs._modules import ModuleState
from zoext.probes import is_compiled
from zoext.updates import State

if TYPE_CHECKING:
    from zoext.optimizer import ZerothOrderOptimizer

T = TypeVar("T")

_PLAIN = {int, float, bool, str, type(None)}

#: Steps without a graph before one is captured, as torch does: what is initialised late is then in place.
WARM_UP = 3


class GraphedStep:
    """``optimizer.step(closure)`` from a CUDA graph: the host launches once instead of kernel by kernel.

    The bits are the same. The first steps run as ever, until nothing but numbers differs from one to the
    next (three, and for AdaMeZO as many more as its window has). Then a step is captured, with its
    forwards, its estimate and its update, for which the host waits once, and replayed from there on. What
    the host decides anew for every step (seeds, learning rates, the window of AdaMeZO) is written to the
    graph's memory before each replay.

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

    A replay runs no Python code of the closure and of the model, so what that code reads is looked at
    before every replay, as far as it can be:

    - Another graph is captured, after some usual steps, where the parameters of the optimizer, ``mu`` or
      ``weight_decay`` changed, or in the optimizer's module and the modules that the closure names a part,
      its train or eval mode, the memory of a weight or buffer, or an attribute that is a tensor, a number,
      a truth value or a string.
    - A replay is refused where a variable of the closure is another one: a global, one around it, a
      default, an argument of a ``functools.partial``, and the attributes that the code of the closure names
      or that of its object's own methods, two deep (``self.options.scale``); of lists and dictionaries all
      entries, up to 64. Of those only tensors, numbers, truth values, strings and modules count.
    - Not seen: what is read through other functions, ``getattr`` or deeper attributes, other containers in
      a module, hooks of modules, and torch's modes (autocast, precision). They are those of the capture.

    The graph keeps memory of its own: as much as the activations of a forward need at their peak, beside
    what torch's cache keeps of steps without a graph. Each capture empties that cache first.

    Args:
        optimizer: any of zoext, with its parameters on a CUDA device.
        closure: as for ``optimizer.step``, but it must return a tensor on the device of the parameters,
            wait for nothing on the device, draw no random numbers (dropout), and leave the numbers and
            tensors that are attributes of modules as they are.

    Raises:
        ValueError: for parameters that are not on a CUDA device.
        TypeError: for a closure without Python code, such as a builtin function.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer, closure: Callable[[], Tensor]) -> None:
        self._optimizer = optimizer
        self._closure = closure
        given = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        self._device = next((tensor.device for tensor in given if tensor.requires_grad), torch.device("cpu"))
        CudaGraph(self._device)
        self._bindings = Bindings(closure)
        self._options: Any = None
        self._modules: ModuleState | None = None
        self._alike = 0
        self._obstacle: str | None = None
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
        if self._has_changed():
            self._bindings.look()
            self._modules, self._alike, self._recorded = self._module_state(), 0, None
        if self._recorded is None:
            if self._alike < WARM_UP or optimizer._probe.is_to_watch:
                return self._warm_up()
            self._recorded = self._record()
        return self._replay(self._recorded)

    def _has_changed(self) -> bool:
        known, self._options = self._options, _options_fixed_by_a_graph(self._optimizer)
        return known != self._options or self._modules is None or not self._modules.is_current()

    def _roots(self) -> list[nn.Module]:
        module = self._optimizer._module
        return self._bindings.modules + ([module] if module is not None else [])

    def _module_state(self) -> ModuleState:
        groups = self._optimizer.param_groups
        return ModuleState(self._roots(), chain.from_iterable(group["params"] for group in groups))

    def _is_compiled(self) -> bool:
        """Where operators are watched, a compiled model would not run compiled."""
        return any(map(is_compiled, self._roots()))

    def _warm_up(self) -> Tensor:
        """A step without a graph. The last one before a capture tells what would be in its way."""
        optimizer, waits = self._optimizer, NotedHostWaits()
        is_last = self._alike >= WARM_UP - 1 and not optimizer._probe.is_to_watch
        if is_last and not self._is_compiled():
            with optimizer._probe.unwatched():
                loss = optimizer._step(capturable(self._closure, self._device, lambda: waits))
        else:
            loss = optimizer._step(capturable(self._closure, self._device, nullcontext))
        assert self._modules is not None
        written = self._modules.changed()
        self._obstacle = waits.first
        if written:  # by the closure itself: no reason to begin again
            self._modules = self._module_state()
            self._obstacle = f"the closure writes {', '.join(written)}, which a replay would not do"
        self._alike = WARM_UP if is_last else min(self._alike + 1, WARM_UP - 1)
        return loss

    def _record(self) -> _Recorded:
        if self._obstacle is not None:
            raise _uncapturable(self._obstacle)
        optimizer = self._optimizer
        watching = nullcontext() if self._is_compiled() else HostWaits()  # type: ignore[no-untyped-call]

        def step() -> tuple[TakenStep, list[State]]:
            with watching:
                return _step_on_the_device(optimizer, self._closure, inputs)

        with interrupts.deferred(), optimizer._estimation(), optimizer._probe.recorded() as memory:
            graph, inputs = CudaGraph(self._device), _Inputs.of(optimizer)
            try:
                taken, states = graph.capture(step)
            except CaptureError:
                raise
            except Exception as error:
                raise _uncapturable(error) from error
            finally:
                optimizer._frame = optimizer._frame_finite = None
        self._bindings.look()
        return _Recorded(graph, inputs, taken, states, memory)

    def _replay(self, recorded: _Recorded) -> Tensor:
        self._optimizer._check_whole()
        if rebound := self._bindings.rebound():
            raise RuntimeError(
                f"closure: {', '.join(sorted(rebound))} is not what it was when the step was captured, and "
                "the graph still reads the old one. Overwrite tensors in place, as with x.copy_(new_x), "
                "or make a new GraphedStep"
            )
        optimizer = self._optimizer
        optimizer._pending.clear()
        with torch.inference_mode(False), torch.no_grad(), interrupts.deferred():
            recorded.inputs.fill(optimizer)
            if optimizer.recorder is not None:
                optimizer.recorder.check()
            optimizer._watch.check()  # last: it may wait for the step before
            recorded.graph.replay()
            # Autograd must see the change, or a stale saved tensor gives wrong gradients without an error.
            moved = chain.from_iterable(group.tensors for group in optimizer._groups)
            torch.autograd.graph.increment_version(tuple(moved))
            step, states = recorded.results(optimizer)
            optimizer._watch.note(step.estimate.finite)
            for group, state in zip(optimizer.param_groups, states, strict=True):
                group["update_state"] = state
            optimizer._count([step])
            optimizer._finish_step(step)
        return step.estimate.loss


def _uncapturable(reason: object) -> RuntimeError:
    return RuntimeError(
        f"the step cannot be captured in a CUDA graph, and nothing was changed: {reason}. Keep the "
        "closure's values on the device (no .item(), .tolist(), .cpu(), nonzero() or boolean indexing, and "
        "no batch that comes from the host) and out of the attributes of modules, or step with "
        "optimizer.step(closure)"
    )


class CaptureError(RuntimeError):
    """The driver refused to begin or to end a capture, and torch may not have left it."""


class CudaGraph:
    """What is captured once and replayed: launches with their addresses and numbers, and their memory."""

    failure: ClassVar[str | None] = None  # of the process: what the driver once refused

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"GraphedStep needs parameters on a CUDA device, not on {device}; move the model there, or "
                "step with optimizer.step(closure)"
            )
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, work: Callable[[], T]) -> T:
        """Records what ``work`` launches, and launches none of it.

        Raises:
            CaptureError: where the driver refused, now or earlier in this process. Where ending a capture
                fails, torch's allocator and generator stay in it.
            Exception: what ``work`` raises, if the capture could be ended.
        """
        if CudaGraph.failure is not None:
            raise CaptureError(_refused(CudaGraph.failure))
        raised: Exception | None = None
        self._graph = torch.cuda.CUDAGraph()
        # The outer context brings the stream back where ending a failed capture raises.
        outer = torch.cuda.stream(torch.cuda.current_stream(self._device))
        try:
            with outer, self._capturing(self._graph):
                try:
                    return work()
                except Exception as error:
                    raised = error
                    raise
        except Exception as error:
            if error is raised:
                raise
            first = raised or error  # that the end failed tells nothing of what went wrong
            CudaGraph.failure = str(first)
            raise CaptureError(_refused(CudaGraph.failure)) from first

    def _capturing(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        return torch.cuda.graph(
            graph,
            stream=torch.cuda.Stream(self._device),
            capture_error_mode="thread_local",  # other threads may go on loading batches
        )

    def replay(self) -> None:
        assert self._graph is not None
        with torch.cuda.device(self._device):
            self._graph.replay()


def _refused(failure: str) -> str:
    return (
        f"the driver refused to capture the step in a CUDA graph: {failure}. Theta was not moved, but "
        "torch's allocator and generator may be left as they are within a capture, so nothing is captured "
        "again: save optimizer and model, restart the process, and step with optimizer.step(closure)"
    )


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
    step: TakenStep
    states: list[State]
    memory: list[Tensor]  # not ours, but read and written by the graph

    def results(self, optimizer: ZerothOrderOptimizer) -> tuple[TakenStep, list[State]]:
        """The step and the new states of a replay, in memory that the next one does not overwrite."""
        before = _tensors([group["update_state"] for group in optimizer.param_groups])
        kept = {id(place): value for place, value in zip(_tensors(self.inputs.states), before, strict=True)}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                kept[id(tensor)] = tensor.clone()
            return kept[id(tensor)]

        fields = {
            field.name: getattr(self.step.estimate, field.name) for field in dataclasses.fields(Estimate)
        }
        # A frame is large, and read by nobody but a recorder: if it cannot be drawn from seeds.
        is_read = optimizer.recorder is not None and optimizer._axes.direction.watches
        known = self.step.frame if is_read else Frame()
        frame = Frame(*_map(keep, (dict(known.left), dict(known.right))))
        return TakenStep(Estimate(**_map(keep, fields)), frame, optimizer._options()), _map(keep, self.states)


def _step_on_the_device(
    optimizer: ZerothOrderOptimizer, closure: Callable[[], Tensor], inputs: _Inputs
) -> tuple[TakenStep, list[State]]:
    estimate = optimizer._evaluate(closure, inputs.seeds, random=None)
    assert optimizer._frame is not None
    options = zip(optimizer._options(), inputs.lrs, strict=True)
    step = TakenStep(estimate, optimizer._frame, tuple(group._replace(lr=lr) for group, lr in options))
    states = [optimizer._update(position, state, [step]) for position, state in enumerate(inputs.states)]
    return step, states


def _options_fixed_by_a_graph(optimizer: ZerothOrderOptimizer) -> Any:
    """What a graph holds as it was at the capture, beside addresses and modules, as plain data."""
    return [
        (
            [(id(tensor), tensor.requires_grad) for tensor in group["params"]],
            [id(value) for tensor in group["params"] for value in optimizer.state.get(tensor, {}).values()],
            (group["mu"], group["weight_decay"], _lr_dtype(group)),
            _map(_outline, group["update_state"]),
        )
        for group in optimizer.param_groups
    ]


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
