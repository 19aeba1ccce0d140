"""A step that a graph cannot repeat raises an error that tells why, and moves nothing.

As far as a graph is said to look: what a closure reads in other ways is listed at ``GraphedStep``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoext
from support.graphed_runs import Run, same
from support.recorded_graph import RecordedGraph
from zoext.graphs import graphed_step as graphs
from zoext.graphs._capturable import HostWaits

x = torch.ones(6, 7)
batches = [torch.ones(6, 7), torch.zeros(6, 7)]


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CudaGraph", RecordedGraph)


def snapshot(run: Run) -> Any:
    return [value.clone() for value in run.model.state_dict().values()], run.optimizer.param_groups[0]["step"]


def test_parameters_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    run = Run(graphed=False)
    with pytest.raises(ValueError, match=r"on a CUDA device, not on cpu; .*optimizer.step\(closure\)"):
        zoext.GraphedStep(run.optimizer, run.closure)


@pytest.mark.parametrize("value", [0.5, None, np.float64(0.5), torch.ones((), device="meta")])
def test_a_loss_that_is_not_on_the_device(value: object) -> None:
    run = Run(graphed=False)
    before = snapshot(run)
    step = zoext.GraphedStep(run.optimizer, lambda: value)
    with pytest.raises(TypeError, match="closure must return a tensor on cpu, not"):
        step()
    assert same(before, snapshot(run))


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: nn.functional.dropout(x, 0.5), "torch"),
        (random.random, "random"),
        (np.random.rand, r"numpy\.random"),
        (lambda: (torch.rand(()), random.random()), "torch and random"),
    ],
)
def test_randomness(draw: Callable[[], object], name: str) -> None:
    run = Run(graphed=False)
    before = snapshot(run)
    step = zoext.GraphedStep(run.optimizer, lambda: (draw(), run.closure())[1])
    with pytest.raises(RuntimeError, match=rf"random numbers from {name}, .*model\.eval\(\)"):
        step()
    assert same(before, snapshot(run))


def test_randomness_that_begins_later() -> None:
    run = Run()
    run.model[2] = nn.Dropout(0.5).eval()
    run.steps(range(6))
    run.model.train()
    with pytest.raises(RuntimeError, match="random numbers"):
        run.step(6)


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda loss: loss.item(), "_local_scalar_dense"),
        (lambda loss: bool(loss > 0), "_local_scalar_dense"),
        (lambda loss: x[x > 0], "index"),
        (lambda loss: x.masked_select(x > 0), "masked_select"),
        (lambda loss: x.nonzero(), "nonzero"),
        (lambda loss: x.index_put((x > 0,), loss), "index_put"),
        (lambda loss: torch.equal(x, x), "equal"),
        (lambda loss: loss.to("meta"), "_to_copy"),
    ],
)
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_a_closure_that_waits(read: Callable[[Tensor], object], name: str, probe: str) -> None:
    run = Run(graphed=False, probe=probe)

    def closure() -> Tensor:
        loss = run.closure()
        read(loss)
        return loss

    run._graphed = zoext.GraphedStep(run.optimizer, closure)
    run.steps(range(3))
    before = snapshot(run)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"nothing was changed: .*{name}.*optimizer\.step\(closure\)"):
            run.step(3)
        assert same(before, snapshot(run))
    run.optimizer.step(closure)


def test_other_modules_at_the_capture() -> None:
    run = Run(graphed=False)
    run.model.append(nn.Linear(3, 3))
    run.optimizer = zoext.MeZO(run.model)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        return run.closure() if len(calls) > 6 else run.model[:-1](run.x).square().mean()

    run._graphed = zoext.GraphedStep(run.optimizer, closure)
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
    run.steps(range(3))
    before = snapshot(run)
    with pytest.raises(zoext.StreamedProbeError, match="other modules ran while the step was captured"):
        run.step(3)
    assert same(before, snapshot(run))


def test_a_torn_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay never goes on from weights that an eager step left between two steps."""
    run = Run().steps(range(6))
    before = deepcopy(run.model.state_dict()), deepcopy(run.optimizer.state_dict())
    move = torch.ops.zoext.noise_axpy_

    def raises_at_its_end(*arguments: object) -> None:
        move(*arguments)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.zoext, "noise_axpy_", raises_at_its_end)
        with pytest.raises(torch.OutOfMemoryError):
            run.optimizer.step(run.closure)
    torn = snapshot(run)
    with pytest.raises(RuntimeError, match=r"only partly applied\. Load the weights"):
        run.step(6)
    assert same(torn, snapshot(run))
    run.model.load_state_dict(before[0])
    run.optimizer.load_state_dict(before[1])
    run.step(6)
    assert same(run.result()[:2], Run().steps(range(7)).result()[:2])


def test_a_torn_update_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run().steps(range(3))
    move = torch.ops.zoext.noise_axpy_

    def raises_at_its_end(*arguments: object) -> None:
        move(*arguments)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.zoext, "noise_axpy_", raises_at_its_end)
        with pytest.raises(torch.OutOfMemoryError):
            run.optimizer.step(run.closure)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="only partly applied"):
            run.step(3)


class TestReplacedTensors:
    """Where the closure's own variables tell: the graph would go on with the old batch."""

    def check(self, run: Run, closure: Callable[[], Tensor], replace: Callable[[], None], name: str) -> None:
        step = zoext.GraphedStep(run.optimizer, closure)
        for _ in range(5):
            step()
        before = snapshot(run)
        replace()
        with pytest.raises(RuntimeError, match=rf"^closure: {name} is not what it was .*x\.copy_\(new_x\)"):
            step()
        assert same(before, snapshot(run))

    def test_global(self) -> None:
        run = Run(graphed=False)

        def replace() -> None:
            global x
            x = x.clone()

        self.check(run, lambda: run.model(x).square().mean(), replace, "x")

    def test_entry_of_a_global(self) -> None:
        run = Run(graphed=False)
        self.check(
            run, lambda: run.model(batches[0]).square().mean(), lambda: batches.insert(0, x + 1), "batches"
        )

    def test_local(self) -> None:
        run = Run(graphed=False)
        batch = {"input": torch.ones(6, 7)}

        def replace() -> None:
            nonlocal batch
            batch = {"input": batch["input"] * 2}

        self.check(run, lambda: run.model(**batch).square().mean(), replace, "batch")

    def test_default(self) -> None:
        run, scale = Run(graphed=False), torch.tensor(2.0)

        def closure(*, scale: Tensor = scale) -> Tensor:
            return run.model(x).square().mean() * scale

        def replace() -> None:
            closure.__kwdefaults__ = {"scale": scale + 1}

        self.check(run, closure, replace, "scale")

    def test_argument_of_a_partial(self) -> None:
        run, batch = Run(graphed=False), {"input": torch.ones(6, 7)}
        for closure, name in (
            (partial(lambda batch: run.model(**batch).square().mean(), batch), "args of the partial"),
            (
                partial(lambda batch: run.model(**batch).square().mean(), batch=batch),
                "keywords of the partial",
            ),
        ):
            self.check(run, closure, lambda: batch.update(input=batch["input"] + 1), name)

    def test_variable_behind_a_decorator(self) -> None:
        run, scale = Run(graphed=False), torch.tensor(1.0)

        @torch.no_grad()
        def closure() -> Tensor:
            return run.model(x).square().mean() * scale

        def replace() -> None:
            nonlocal scale
            scale = scale * 2

        self.check(run, closure, replace, "scale")

    def test_strides(self) -> None:
        run, weight = Run(graphed=False), torch.ones(7, 7).triu()

        def replace() -> None:
            weight.t_()

        self.check(run, lambda: run.model(x @ weight).square().mean(), replace, "weight")

    def test_numbers_are_frozen_at_capture(self) -> None:
        run, scale = Run(graphed=False), 1.0
        step = zoext.GraphedStep(run.optimizer, lambda: run.model(x).square().mean() * scale)
        for _ in range(5):
            step()
        scale = 2.0
        step()
        assert step._captured is not None

    def test_an_attribute_of_the_same_name_is_none_of_these(self) -> None:
        global shape
        run = Run(graphed=False)
        step = zoext.GraphedStep(run.optimizer, lambda: run.model(x).square().sum() / x.shape[0])
        for size in range(6):
            shape = torch.tensor(size)
            step()
        assert shape == 5


class WaitlessGraph(RecordedGraph):
    """As the driver, it would be broken by a wait: so none may ever come as far."""

    def capture(self, work: Callable[[], Any]) -> Any:
        raise AssertionError("a capture was begun")


@pytest.mark.parametrize("with_module", [True, False])
def test_waiting_is_found_before_a_capture(monkeypatch: pytest.MonkeyPatch, with_module: bool) -> None:
    monkeypatch.setattr(graphs, "CudaGraph", WaitlessGraph)
    run = Run(graphed=False)
    if not with_module:
        run.optimizer = zoext.MeZO(list(run.model.parameters()))
        run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
    run._graphed = zoext.GraphedStep(run.optimizer, lambda: run.closure() * (run.x.sum().item() + 1))
    run.steps(range(3))
    before = snapshot(run)
    with pytest.raises(RuntimeError, match=r"nothing was changed: .*_local_scalar_dense"):
        run.step(3)
    assert same(before, snapshot(run))


class TestTheDriverRefuses:
    """In the place of torch's graphs there are some whose capture cannot be ended."""

    @pytest.fixture(autouse=True)
    def _broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()

        class Capture:
            def __init__(self, *args: object, **kwargs: object) -> None: ...

            def __enter__(self) -> None:
                TestTheDriverRefuses.begun += 1

            def __exit__(self, *args: object) -> None:
                if args[0] is not ValueError:
                    raise RuntimeError("operation failed due to a previous error during capture")

        def stream(*args: object) -> AbstractContextManager[None]:
            return nullcontext()

        TestTheDriverRefuses.begun = 0
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        for name in ("Stream", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, stream)
        monkeypatch.setattr(graphs.CudaGraph, "failure", None)

    begun = 0

    def fail(self, kind: type[Exception]) -> None:
        raise kind("not permitted when stream is capturing")

    def test_with_the_first_error_and_once(self) -> None:
        device = torch.device("cuda", 0)
        for _ in range(2):
            with pytest.raises(graphs.CaptureError, match=r"not permitted when .*restart the process"):
                graphs.CudaGraph(device).capture(lambda: self.fail(RuntimeError))
        assert self.begun == 1

    def test_although_nothing_was_raised_before(self) -> None:
        with pytest.raises(graphs.CaptureError, match=r"previous error during capture.*restart the process"):
            graphs.CudaGraph(torch.device("cuda", 0)).capture(lambda: None)

    def test_but_not_where_the_capture_ends(self) -> None:
        for begun in (1, 2):
            with pytest.raises(ValueError, match="not permitted"):
                graphs.CudaGraph(torch.device("cuda", 0)).capture(lambda: self.fail(ValueError))
            assert self.begun == begun


def test_another_optimizer() -> None:
    run, other = Run(), Run()
    with pytest.raises(ValueError, match="GraphedStep of this optimizer"):
        other.optimizer.step(run._graphed)


def test_no_closure_for_an_estimate() -> None:
    run = Run()
    with pytest.raises(RuntimeError, match="called by its own closure"):
        run.optimizer.estimate(run._graphed)


@pytest.mark.parametrize("call", ["step", "estimate"])
def test_a_capture_from_outside(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    run = Run(graphed=False)
    before = snapshot(run)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"replay would use the same directions.*zoext\.GraphedStep"):
        getattr(run.optimizer, call)(run.closure)
    assert same(before, snapshot(run))


def test_steps_do_not_begin_to_use_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise AssertionError("asked although CUDA is not in use")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fail)
    Run(graphed=False).step(0)


class TestTheStandIn:
    """The tests of graphs are worth as much as the graph they use."""

    def test_replays_operators_on_the_memory_of_the_capture(self) -> None:
        source, sink, scale = torch.ones(3), torch.zeros(3), 2.0
        graph = RecordedGraph(torch.device("cpu"))

        def work() -> Tensor:
            sink.add_(source.view(3) * scale)
            return sink + 1

        result = graph.capture(work)
        assert torch.equal(sink, torch.zeros(3))
        assert not torch.equal(result, torch.ones(3))
        source.copy_(torch.tensor([1.0, 2.0, 3.0]))
        scale = 5.0
        for replay in (1, 2):
            graph.replay()
            assert torch.equal(sink, torch.tensor([2.0, 4.0, 6.0]) * replay)
            assert torch.equal(result, sink + 1)

    def test_goes_by_addresses(self) -> None:
        parameter = nn.Parameter(torch.ones(3))
        first, sink = parameter.data, torch.zeros(3)
        graph = RecordedGraph(torch.device("cpu"))
        with torch.no_grad():
            graph.capture(lambda: sink.copy_(parameter))
            parameter.data = torch.full((3,), 7.0)
            graph.replay()
            assert torch.equal(sink, torch.ones(3))
            del first
            with pytest.raises(AssertionError, match="freed"):
                graph.replay()

    def test_refuses_to_wait(self) -> None:
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            RecordedGraph(torch.device("cpu")).capture(lambda: torch.ones(()).item())


def test_operators_that_do_not_wait() -> None:
    index = torch.tensor([0, 2])
    with HostWaits():
        x[index, :]
        x.index_put((index,), torch.zeros(()))
        torch.where(x > 0, x, 0.0)
        x.repeat_interleave(torch.full((6,), 2), dim=0, output_size=12)
        torch.ones(2).copy_(torch.zeros(2))
