"""A step replayed from a graph is the step that would have run without: the same bits in every respect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import zoext
from support.graphed_runs import RECIPES, Run, same
from support.recorded_graph import RecordedGraph
from zoext._engine import AppliedStep
from zoext.graphs import graphed_step as graphs

STEPS = 12


@pytest.fixture(autouse=True)
def graph(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    class Graph(RecordedGraph):
        captures = replays = 0  # its own: other files count with the class itself

    monkeypatch.setattr(graphs, "CudaGraph", Graph)
    return Graph


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("dtype", "probe"),
    [(torch.float32, "streamed"), (torch.bfloat16, "streamed"), (torch.float32, "inplace")],
)
def test_over_a_run(graph: type[RecordedGraph], recipe: str, dtype: torch.dtype, probe: str) -> None:
    """With a new batch and a new lr at every step; what earlier steps returned does not change either."""
    eager = Run(recipe, graphed=False, dtype=dtype, probe=probe).steps(range(STEPS))
    graphed = Run(recipe, dtype=dtype, probe=probe).steps(range(STEPS))
    assert graph.captures == 1
    assert graph.replays >= STEPS - 6
    assert same(graphed.result(), eager.result())


@pytest.mark.parametrize("recipe", ["lozo", "agzo"])
def test_a_recorder_gets_the_factors_that_no_seed_gives(graph: type[RecordedGraph], recipe: str) -> None:
    """The others stay where they are: a copy of those of LowRank is as large as a gradient's."""

    class Frames(list[bool]):
        def check(self) -> None:
            pass

        def record(self, step: AppliedStep) -> None:
            self.append(bool(step.frame.left or step.frame.right))

    run, frames = Run(recipe), Frames()
    run.steps(range(4))
    run.optimizer.recorder = frames
    replays = graph.replays
    run.steps(range(4, STEPS))
    assert frames[replays - graph.replays :] == [recipe == "agzo"] * (graph.replays - replays)
    assert graph.replays > replays


@pytest.mark.parametrize("lr", [torch.tensor(0.02), torch.tensor(0.02, dtype=torch.float64)])
def test_with_lr_as_a_tensor(graph: type[RecordedGraph], lr: torch.Tensor) -> None:
    runs = [Run("adamezo", graphed=graphed, lr=lr.clone()).steps(range(STEPS)) for graphed in (False, True)]
    assert graph.replays > 0
    assert same(runs[0].result(), runs[1].result())


def test_with_several_groups(graph: type[RecordedGraph]) -> None:
    def run(graphed: bool) -> Run:
        run = Run("mezo", graphed=False)
        groups = [
            {"params": list(run.model[0].parameters()), "lr": 0.03, "mu": 2e-2},
            {"params": list(run.model[3:].parameters()), "weight_decay": 0.3},
        ]
        run.optimizer = zoext.AdaMeZO(groups, lr=0.01, horizon=2, probe=zoext.StreamedProbe(run.model))
        run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.9**step)
        run._graphed = zoext.GraphedStep(run.optimizer, run.closure) if graphed else None
        return run.steps(range(STEPS))

    eager, graphed = run(False), run(True)
    assert graph.replays > 0
    assert same(graphed.result(), eager.result())


@pytest.mark.parametrize("recipe", ["adamezo", "adam over agzo", "lozo"])
def test_mixed_with_eager_steps(graph: type[RecordedGraph], recipe: str) -> None:
    eager = Run(recipe, graphed=False).steps(range(STEPS))
    mixed = Run(recipe)
    graphed = mixed._graphed
    for step in range(STEPS):
        mixed._graphed = None if step in (2, 7, 10) else graphed
        mixed.step(step)
    assert graph.captures == 1
    assert same(mixed.result(), eager.result())


@pytest.mark.parametrize("recipe", ["mezo", "adamezo", "agzo", "lozo"])
@pytest.mark.parametrize("stop", [2, 8])
def test_resumed(graph: type[RecordedGraph], recipe: str, stop: int) -> None:
    whole = Run(recipe).steps(range(STEPS))
    first = Run(recipe).steps(range(stop))
    second = Run(recipe)
    for part in ("model", "optimizer", "scheduler"):
        getattr(second, part).load_state_dict(getattr(first, part).state_dict())
    second.steps(range(stop, STEPS))
    assert same(second.result()[:2], whole.result()[:2])
    second.optimizer.load_state_dict(first.optimizer.state_dict())  # also into a graph that is there
    second.model.load_state_dict(first.model.state_dict())
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.steps(range(stop, STEPS))
    assert same(second.result()[:2], whole.result()[:2])


def new_memory(run: Run) -> None:
    run.model[0].weight.data = run.model[0].weight.data.clone()


def new_memory_of_what_is_frozen(run: Run) -> None:
    run.model[3].weight.data = run.model[3].weight.data + 0.5


def new_mode(run: Run) -> None:
    run.model.eval()


def new_strides(run: Run) -> None:
    run.model[3].weight.data = run.model[3].weight.data.view(11, 5).t()


def thaw(run: Run) -> None:
    run.model[3].weight.requires_grad_(True)


def freeze(run: Run) -> None:
    run.model[5].requires_grad_(False)


def option(name: str, value: float) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        run.optimizer.param_groups[0][name] = value

    change.__name__ = name
    return change


CHANGES = [
    new_memory,
    new_memory_of_what_is_frozen,
    new_mode,
    new_strides,
    thaw,
    freeze,
    option("mu", 0.03),
    option("weight_decay", 0.0),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("recipe", ["mezo", "adamezo"])
def test_after_a_change(graph: type[RecordedGraph], recipe: str, change: Callable[[Run], None]) -> None:
    """The graph is dropped, and there is a new one some steps later."""
    runs = []
    for graphed in (False, True):
        run = Run(recipe, graphed=graphed)
        run.model[3].weight.requires_grad_(False)
        run.steps(range(8))
        change(run)
        runs.append(run.steps(range(8, 18)))
    assert graph.captures == 2
    assert same(runs[0].result(), runs[1].result())


def test_in_inference_mode(graph: type[RecordedGraph]) -> None:
    runs = []
    for graphed in (False, True):
        run = Run("adamezo", graphed=graphed)
        with torch.inference_mode():
            run.steps(range(8))
        runs.append(run.steps(range(8, STEPS)))
    assert graph.captures == 1
    assert same(runs[0].result(), runs[1].result())


class Doubling(nn.Module):
    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.training else loss * 2


def test_after_a_change_of_mode_of_a_module_that_only_the_closure_knows(graph: type[RecordedGraph]) -> None:
    """With bare parameters, and a part of the loss that has none which move."""
    runs = []
    for graphed in (False, True):
        run = Run(graphed=False)
        run.optimizer = zoext.MeZO(list(run.model.parameters()), seed=5, lr=2e-2, mu=1e-2)
        run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
        teacher, closure = Doubling(), run.closure
        run.closure = lambda teacher=teacher, closure=closure: teacher(closure())
        run._graphed = zoext.GraphedStep(run.optimizer, run.closure) if graphed else None
        run.steps(range(6))
        teacher.eval()
        run.model.eval()
        runs.append(run.steps(range(6, STEPS)))
    assert graph.captures == 2
    assert same(runs[0].result(), runs[1].result())


def test_other_modules_in_the_last_step_before_a_capture(graph: type[RecordedGraph]) -> None:
    """They ran unwatched: the capture waits until they were looked at."""
    runs = []
    for graphed in (False, True):
        run, calls = Run(graphed=False), []

        def closure(run: Run = run, calls: list[int] = calls) -> torch.Tensor:
            calls.append(1)
            x = run.model[:4](run.x)
            return nn.functional.cross_entropy(x[:, :3] if len(calls) <= 11 else run.model[4:](x), run.y)

        run.closure = closure
        run._graphed = zoext.GraphedStep(run.optimizer, run.closure) if graphed else None
        runs.append(run.steps(range(STEPS)))
    assert graph.captures == 1
    assert same(runs[0].result(), runs[1].result())


def test_without_more_than_a_launch(graph: type[RecordedGraph]) -> None:
    """The closure's Python code does not run again."""
    run = Run("mezo")
    calls = []
    run._graphed = zoext.GraphedStep(run.optimizer, lambda: calls.append(1) or run.closure())
    run.steps(range(4))
    before = len(calls)
    run.steps(range(4, 8))
    assert len(calls) == before == 4 * 4


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("recipe", ["mezo", "adamezo", "greedy"])
def test_where_a_loss_is_not_finite(graph: type[RecordedGraph], recipe: str, policy: str) -> None:
    runs = []
    for graphed in (False, True):
        run = Run(recipe, graphed=graphed, nonfinite=policy).steps(range(8))
        healthy, closure = run.x.clone(), run.closure
        theta = [parameter.detach().clone() for parameter in run.model.parameters()]
        run.x.fill_(float("nan"))
        if policy == "raise":
            with pytest.raises(FloatingPointError, match="was not finite"):
                run._graphed() if run._graphed else run.optimizer.step(closure)
        else:
            run._graphed() if run._graphed else run.optimizer.step(closure)
        assert run.optimizer.nonfinite_steps == 1
        assert same(theta, list(run.model.parameters()))
        run.x.copy_(healthy)
        runs.append(run.steps(range(8, STEPS)))
    assert same(runs[0].result(), runs[1].result())


def test_with_an_estimate_before() -> None:
    """It is dropped, as ``step(closure)`` does, and nothing is left for a later ``step()``."""
    runs = []
    for graphed in (False, True):
        run = Run("mezo", graphed=graphed).steps(range(6))
        run.optimizer.estimate(run.closure)
        runs.append(run.steps(range(6, 8)))
        with pytest.raises(RuntimeError, match="nothing to apply"):
            run.optimizer.step()
    assert same(runs[0].result(), runs[1].result())


def test_with_the_optimizers_hooks() -> None:
    run = Run("mezo")
    seen: list[str] = []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run.steps(range(6))
    assert seen == ["before", "after"] * 6


def test_autograd_sees_what_a_replay_moved() -> None:
    run = Run("mezo").steps(range(5))
    weight = run.model[0].weight
    loss = weight.square().sum()
    run.step(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_memory_of_the_probe_stays() -> None:
    """Another closure that needs more of it makes the probe take other memory."""
    runs = []
    for graphed in (False, True):
        run = Run("mezo", graphed=graphed).steps(range(6))
        run.optimizer.engine.probe._swap._scratch.prepare({torch.device("cpu"): 10**6})
        runs.append(run.steps(range(6, 9)))
    assert same(runs[0].result(), runs[1].result())
