"""Runs a whole step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from zoext._engine import AppliedStep, GroupOptions, StepEngine, StepExecutor
from zoext._parameters.wrappers import is_compiled
from zoext._runtime import interrupts
from zoext.estimators import Estimate
from zoext.graphs._capturable import HostWaits, NotedHostWaits, capturable
from zoext.graphs._captured import CapturedStep, Inputs, lr_dtype, map_tensors
from zoext.graphs._cuda_graph import CaptureError, CudaGraph
from zoext.graphs._static_inputs import StaticInputs, place_of
from zoext.optimizer import ZerothOrderOptimizer, unwrap
from zoext.updates import State

#: Steps without a graph before the capture, as in torch, so that lazy initialization is complete.
WARM_UP = 3


class GraphedStep(StepExecutor):
    """Runs ``optimizer.step(closure)`` as a CUDA graph: one launch per step instead of one per kernel.

    The results have the same bits. The first steps run without a graph, until consecutive steps differ only
    in numbers (three steps, plus the length of the window for AdaMeZO). Then one step is captured, with its
    forwards, its estimate and its update, and replayed from then on. The values that the host sets for every
    step (seeds, learning rates, the window of AdaMeZO) are written to the graph's memory before each replay.

    Inputs are static, as for ``torch.cuda.make_graphed_callables``: overwrite the batch in place.

        x, y = torch.empty(8, 512, device="cuda"), torch.empty(8, dtype=torch.long, device="cuda")
        step = zoext.GraphedStep(optimizer, lambda: cross_entropy(model(x), y))
        for new_x, new_y in loader:
            x.copy_(new_x, non_blocking=True)
            y.copy_(new_y, non_blocking=True)
            loss = step()
            scheduler.step()

    Steps with and without a graph can be mixed, checkpoints are the same, and the hooks of the optimizer run
    at every step. With ``LowRank(defer=True)``, the first step of an interval and the first one after a merge
    run without the graph.

    A replay runs no Python code of the closure or the model. These changes are detected:

    - Binding a variable of the closure to another tensor raises an error. Variables are globals, free
      variables, defaults, arguments of a ``functools.partial``, and entries of lists and dictionaries among
      these.
    - Changing the parameters, ``mu`` or ``weight_decay``, or the train or eval mode of the optimizer's module
      or of modules in those variables, leads to a new capture after some steps without a graph.

    Everything else is frozen at capture and not checked: attributes of objects and modules, numbers, replaced
    modules, hooks, and modes of torch such as autocast. Create a new ``GraphedStep`` after changing them.

    The graph has its own memory pool, as large as the peak of a forward's activations. Each capture first
    empties the cache of torch's allocator.

    Args:
        optimizer: a zoext optimizer, or a wrapper of one, with its parameters on a CUDA device.
        closure: as for ``optimizer.step``, but it must return a tensor on the device of the parameters,
            never wait for the device, and draw no random numbers (dropout).

    Raises:
        ValueError: for parameters that are not on one CUDA device, and for a member of an ``ElasticGroup``.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer, closure: Callable[..., Tensor]) -> None:
        self._optimizer = unwrap(optimizer)
        self._closure = closure
        if self._optimizer.engine.ranks.waits_for_losses:
            raise ValueError(
                "process_group: the members of an ElasticGroup read their losses on the host, which a graph "
                "cannot; step with optimizer.step(closure), or pass a ProcessGroup"
            )
        given = chain.from_iterable(group["params"] for group in self._optimizer.param_groups)
        devices = dict.fromkeys(tensor.device for tensor in given if tensor.requires_grad)
        self._device = next(iter(devices), torch.device("cpu"))
        CudaGraph(self._device)
        if len(devices) > 1:
            places = ", ".join(map(str, devices))
            raise ValueError(
                f"GraphedStep needs all parameters on one device, not on {places}; step with "
                "optimizer.step(closure)"
            )
        self._inputs = StaticInputs(closure)
        self._modules: list[nn.Module] = []
        self._is_compiled = False
        self._fixed: Any = None
        self._alike = 0
        self._obstacle: str | None = None
        self._captured: CapturedStep | None = None

    def __call__(self) -> Tensor:
        """Takes one step.

        Returns:
            The mean of the losses evaluated, float32 [], on the device of the parameters.

        Raises:
            RuntimeError: if the closure cannot be captured, or if its tensors were replaced instead of
                overwritten. Theta is not moved.
            TypeError: if the closure does not return a tensor on the device.
            FloatingPointError: as for ``optimizer.step``.
        """
        return self._optimizer.step(self)

    def advance(self, engine: StepEngine) -> Tensor:
        """Takes the step; ``optimizer.step`` calls this between its hooks."""
        if engine is not self._optimizer.engine:
            raise ValueError("closure must be a GraphedStep of this optimizer, not of another one")
        if self._fixed is None or self._fixed != _fixed_by_a_graph(engine, self._modules):
            self._begin_anew(engine)
        if self._captured is None and (self._alike < WARM_UP or engine.probe.is_to_watch):
            return self._warm_up(engine)
        if self._holds_nothing(engine):
            return engine.step(capturable(self._closure, self._device, nullcontext)).estimate.loss
        if self._captured is None:
            self._captured = self._capture(engine)
        return self._replay(engine, self._captured)

    def _holds_nothing(self, engine: StepEngine) -> bool:
        """Whether probes find no sum of ``defer=True`` to add, while a graph adds one."""
        if not engine.axes.direction.defers:
            return False
        engine.check_ready()
        engine.deferral.begin(engine.param_groups)
        return engine.deferral.is_empty

    def _begin_anew(self, engine: StepEngine) -> None:
        """Drops the graph, and takes the current state as the fixed one."""
        self._inputs = StaticInputs(self._closure)
        roots = self._inputs.modules + ([engine.module] if engine.module is not None else [])
        self._modules = list(dict.fromkeys(part for root in roots for part in root.modules()))
        # A compiled model would run uncompiled while operators are watched.
        self._is_compiled = any(map(is_compiled, roots))
        self._fixed = _fixed_by_a_graph(engine, self._modules)
        self._alike, self._captured = 0, None

    def _warm_up(self, engine: StepEngine) -> Tensor:
        """A step without a graph. The last one before a capture records what would make the capture fail."""
        waits = NotedHostWaits()
        is_last = self._alike >= WARM_UP - 1 and not engine.probe.is_to_watch
        if is_last and not self._is_compiled:
            with engine.probe.unwatched():
                step = engine.step(capturable(self._closure, self._device, lambda: waits))
        else:
            step = engine.step(capturable(self._closure, self._device, nullcontext))
        self._obstacle = waits.first
        self._alike = WARM_UP if is_last else min(self._alike + 1, WARM_UP - 1)
        return step.estimate.loss

    def _capture(self, engine: StepEngine) -> CapturedStep:
        engine.check_ready()
        if self._obstacle is not None:
            raise _uncapturable(self._obstacle)
        watching = nullcontext() if self._is_compiled else HostWaits()  # type: ignore[no-untyped-call]
        taken: list[tuple[AppliedStep, list[State]]] = []

        def options(_: Estimate) -> tuple[GroupOptions, ...]:
            return tuple(
                group._replace(lr=lr) for group, lr in zip(engine.options(), inputs.lrs, strict=True)
            )

        def step() -> None:
            context = engine.context(inputs.seeds, shares_random=False)
            with watching:
                engine.compute(
                    context, self._closure, inputs.states, options, lambda *results: taken.append(results)
                )

        engine.run.pending.clear()
        with interrupts.deferred(), engine.closures(), engine.probe.captured() as memory:
            graph, inputs = CudaGraph(self._device), Inputs.of(engine)
            try:
                graph.capture(step)
            except CaptureError:
                raise
            except Exception as error:
                raise _uncapturable(error) from error
            finally:
                engine.run.is_torn = False  # a capture launches nothing
        self._inputs = StaticInputs(self._closure)
        return CapturedStep(graph, inputs, *taken[0], memory)

    def _replay(self, engine: StepEngine, captured: CapturedStep) -> Tensor:
        engine.check_ready()
        engine.ranks.raise_if_differing()
        if rebound := self._inputs.rebound():
            raise RuntimeError(
                f"closure: {', '.join(sorted(rebound))} is not what it was when the step was captured, and "
                "the graph still reads the old one. Overwrite tensors in place, as with x.copy_(new_x), "
                "or make a new GraphedStep"
            )
        engine.run.pending.clear()
        with torch.inference_mode(False), torch.no_grad(), interrupts.deferred():
            captured.inputs.fill(engine)
            captured.graph.replay()
            # Without a new version, autograd would silently use stale saved tensors in later gradients.
            torch.autograd.graph.increment_version(tuple(_moved(engine)))
            step, states = captured.results(engine)
            engine.watch.note(step.estimate)
            engine.commit(step, states)
        return step.estimate.loss


def _moved(engine: StepEngine) -> Iterator[Tensor]:
    """The tensors that a step writes to: not those whose steps ``defer=True`` holds back."""
    held = engine.deferral.sums
    for group in engine.groups:
        yield from (tensor for key, tensor in zip(group.keys, group.tensors, strict=True) if key not in held)


def _uncapturable(reason: object) -> RuntimeError:
    return RuntimeError(
        f"the step cannot be captured in a CUDA graph, and nothing was changed: {reason}. Keep the "
        "closure's values on the device (no .item(), .tolist(), .cpu(), nonzero() or boolean indexing, and "
        "no batch that comes from the host) and out of the attributes of modules, or step with "
        "optimizer.step(closure)"
    )


def _fixed_by_a_graph(engine: StepEngine, modules: list[nn.Module]) -> Any:
    """The state that a graph fixes at capture, as plain data."""
    state = engine.owner.state
    return [part.training for part in modules], [
        (
            [(id(tensor), tensor.requires_grad, *place_of(tensor)) for tensor in group["params"]],
            [id(value) for tensor in group["params"] for value in state.get(tensor, {}).values()],
            (group["mu"], group["weight_decay"], lr_dtype(group)),
            map_tensors(lambda tensor: (tensor.shape, tensor.dtype), group["update_state"]),
        )
        for group in engine.param_groups
    ]
