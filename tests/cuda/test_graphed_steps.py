"""On CUDA a step holds nothing that a graph cannot, and from a graph it is the same step.

Where there is no GPU and an emulator in its place, which has no graphs, a stand-in takes theirs: it records
operators with their addresses. It knows of no streams, and not of what a driver refuses.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import zoext
from support.cuda_comparison import MARKS, fakegpu
from support.graphed_runs import RECIPES, Run, same
from support.recorded_graph import RecordedGraph
from zoext.graphs import graphed_step as graphs
from zoext.graphs._capturable import HostWaits

pytestmark = MARKS
STREAMED = [(recipe, torch.float32, "streamed") for recipe in RECIPES]
OTHERS = [("mezo", torch.bfloat16, "streamed"), ("mezo", torch.float32, "inplace")]


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    if fakegpu is not None:
        monkeypatch.setattr(graphs, "CudaGraph", RecordedGraph)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_no_operator_of_a_step_waits(recipe: str, probe: str) -> None:
    """Seen operator by operator: not all that wait, wait where it is emulated."""
    run = Run(recipe, graphed=False, device="cuda", probe=probe, nonfinite="skip").steps(range(2))
    with HostWaits():
        run.optimizer.step(run.closure)


def test_a_number_that_goes_to_the_device() -> None:
    with HostWaits():
        torch.tensor([], device="cuda")  # nothing to copy
        torch.where(torch.ones(2, device="cuda") > 0, 1.0, 0.0)
        torch.ones(2, device="cuda").copy_(torch.ones(2).pin_memory(), non_blocking=True)
        for copy in (
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: torch.ones(2).cuda(),
            lambda: torch.ones(2, device="cuda").cpu(),
            lambda: torch.ones(2, device="cuda").copy_(torch.ones(2)),
        ):
            with pytest.raises(RuntimeError, match="copies between the host and the device"):
                copy()


@pytest.mark.parametrize(("recipe", "dtype", "probe"), [*STREAMED, *OTHERS])
def test_over_a_run(recipe: str, dtype: torch.dtype, probe: str) -> None:
    eager, graphed = (
        Run(recipe, graphed=graphed, device="cuda", dtype=dtype, probe=probe) for graphed in (False, True)
    )
    assert same(graphed.steps(range(8)).result(), eager.steps(range(8)).result())
    assert graphed._graphed._captured is not None


def test_a_replay_waits_for_nothing() -> None:
    run = Run("adamezo", device="cuda", nonfinite="skip").steps(range(8))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run._graphed()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_loss_that_is_not_finite() -> None:
    run = Run("mezo", device="cuda").steps(range(6))
    theta = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.x.fill_(float("nan"))
    run._graphed()
    assert same(theta, list(run.model.parameters()))
    with pytest.raises(FloatingPointError, match="of the previous step"):
        run._graphed()
    assert same(theta, list(run.model.parameters()))


@pytest.mark.skipif(fakegpu is not None, reason="the emulator has no graphs")
def test_a_capture_from_outside() -> None:
    run = Run("mezo", graphed=False, device="cuda").steps(range(3))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="GraphedStep"), torch.cuda.graph(graph):
        run.optimizer.step(run.closure)
    run.step(3)


def test_a_closure_that_waits() -> None:
    """Found before a capture is begun, also without a module; steps go on without a graph."""
    run = Run("mezo", graphed=False, device="cuda", probe="inplace")
    run.optimizer = zoext.MeZO(list(run.model.parameters()))
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)

    def closure() -> torch.Tensor:
        loss = run.closure()
        loss.item()
        return loss

    run._graphed = zoext.GraphedStep(run.optimizer, closure)
    run.steps(range(3))
    stream = torch.cuda.current_stream()
    theta = [parameter.detach().clone() for parameter in run.model.parameters()]
    with pytest.raises(RuntimeError, match="nothing was changed"):
        run.step(3)
    assert torch.cuda.current_stream() == stream
    assert same(theta, list(run.model.parameters()))
    run.optimizer.step(closure)


REFUSED = """
import torch, zoext
weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
optimizer = zoext.MeZO([weight])
def closure():
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    return weight.sum()
step = zoext.GraphedStep(optimizer, closure)
for _ in range(3):
    step()
stream, theta = torch.cuda.current_stream(), weight.detach().clone()
for _ in range(2):
    try:
        step()
    except zoext.graphs.CaptureError as error:
        assert "capturing" in str(error) and "restart the process" in str(error), error
    else:
        raise AssertionError("captured")
assert torch.cuda.current_stream() == stream and torch.equal(weight, theta)
"""


@pytest.mark.skipif(fakegpu is not None, reason="the emulator has no graphs")
def test_a_capture_that_the_driver_refuses() -> None:
    """In a process of its own, which nothing can capture in any more."""
    subprocess.run([sys.executable, "-c", REFUSED], check=True)
