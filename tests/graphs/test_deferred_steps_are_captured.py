"""Graphed steps of ``LowRank(defer=True)`` have the bits of eager ones, and sums in fixed memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import zoext
from support.graphed_runs import Run, same
from support.recorded_graph import RecordedGraph
from zoext.graphs import graphed_step as graphs

STEPS, INTERVAL = 17, 5


@pytest.fixture(autouse=True)
def graph(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    class Graph(RecordedGraph):
        captures = replays = 0

    monkeypatch.setattr(graphs, "CudaGraph", Graph)
    return Graph


def deferred(graphed: bool, estimator: zoext.Estimator | None = None, **options: Any) -> Run:
    run = Run(graphed=False, dtype=options.pop("dtype", torch.float32))
    run.optimizer = zoext.ZerothOrderOptimizer(
        run.model,
        direction=zoext.LowRank(rank=2, refresh_interval=INTERVAL, defer=True),
        estimator=estimator,
        **{"lr": 2e-2, "mu": 1e-2, "seed": 5, **options},
    )
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.9**step)
    run._graphed = zoext.GraphedStep(run.optimizer, run.closure) if graphed else None
    return run


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "residual")],
)
@pytest.mark.parametrize("estimator", [zoext.CentralDifference(samples=2), zoext.ForwardDifference()])
def test_over_a_run(
    graph: type[RecordedGraph], estimator: zoext.Estimator, dtype: torch.dtype, precision: str
) -> None:
    """Without a graph are the warm-up and the first step of each of three further intervals."""
    runs = [
        deferred(graphed, estimator, dtype=dtype, precision=precision).steps(range(STEPS))
        for graphed in (False, True)
    ]
    assert graph.captures == 1
    begun_anew = precision == "residual"  # which the first step makes
    assert graph.replays == STEPS - graphs.WARM_UP - 3 - begun_anew
    assert same(runs[0].result(), runs[1].result())


def test_with_looks_between_steps(graph: type[RecordedGraph], tmp_path: Path) -> None:
    """The step after a look finds nothing to add; a recording tells it, and replays."""
    runs, base = [], copy.deepcopy(deferred(False, dtype=torch.bfloat16).model)
    for graphed in (False, True):
        run = deferred(graphed, dtype=torch.bfloat16)
        with zoext.Trajectory(tmp_path / f"{graphed}.jsonl", run.optimizer):
            for step in range(STEPS):
                run.step(step)
                if step in (1, 7):
                    run.model(run.x)
                if step == 11:
                    run.optimizer.state_dict()
        runs.append(run)
    assert graph.captures == 1
    assert graph.replays == STEPS - graphs.WARM_UP - 5
    assert same(runs[0].result(), runs[1].result())
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 1
    zoext.replay(base, tmp_path / "True.jsonl")
    assert same(list(base.parameters()), list(runs[1].model.parameters()))


def test_mixed_with_eager_steps(graph: type[RecordedGraph]) -> None:
    eager = deferred(False, dtype=torch.bfloat16).steps(range(STEPS))
    mixed = deferred(True, dtype=torch.bfloat16)
    graphed = mixed._graphed
    for step in range(STEPS):
        mixed._graphed = None if step in (2, 7, 9, 12) else graphed
        mixed.step(step)
    assert graph.captures == 1
    assert same(mixed.result(), eager.result())


def test_after_a_weight_was_frozen(graph: type[RecordedGraph]) -> None:
    runs = []
    for graphed in (False, True):
        run = deferred(graphed, dtype=torch.bfloat16).steps(range(8))
        run.model[3].weight.requires_grad_(False)
        runs.append(run.steps(range(8, STEPS)))
    assert graph.captures == 2
    assert same(runs[0].result(), runs[1].result())


def test_a_capture_that_fails_keeps_the_sums(graph: type[RecordedGraph], monkeypatch: Any) -> None:
    """They are those of the steps before it, and merge with the seed of the last of these."""
    runs = []
    for graphed in (False, True):
        run = deferred(graphed, dtype=torch.bfloat16).steps(range(3))
        if graphed:
            with monkeypatch.context() as patch:
                patch.setattr(graph, "capture", _refusing(graph.capture))
                with pytest.raises(RuntimeError, match="the step cannot be captured"):
                    run._graphed()
        run.optimizer.merge()
        runs.append(list(run.model.parameters()))
    assert same(*runs)


def _refusing(capture: Any) -> Any:
    def refuse(self: RecordedGraph, work: Any) -> None:
        capture(self, work)
        raise ValueError("no more memory")

    return refuse


def test_where_a_loss_is_not_finite(graph: type[RecordedGraph]) -> None:
    runs = []
    for graphed in (False, True):
        run = deferred(graphed, dtype=torch.bfloat16, nonfinite="skip").steps(range(7))
        healthy = run.x.clone()
        run.x.fill_(float("nan"))
        run._graphed() if run._graphed else run.optimizer.step(run.closure)
        run.x.copy_(healthy)
        runs.append(run.steps(range(8, STEPS)))
    assert same(runs[0].result(), runs[1].result())
