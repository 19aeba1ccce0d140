"""A batched step replayed from a graph has the bits of the step without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.graphed_runs import RECIPES, Run, same
from support.recorded_graph import RecordedGraph
from zoext.graphs import graphed_step as graphs

STEPS = 9


class BatchedRun(Run):
    """With a closure that takes the number of copies."""

    def __init__(self, recipe: str, *, graphed: bool, dtype: torch.dtype) -> None:
        super().__init__(recipe, graphed=False, dtype=dtype, probe="batched")
        self.model.eval()  # for the sake of its batch normalization
        self._graphed = zoext.GraphedStep(self.optimizer, self.of_copies) if graphed else None

    def of_copies(self, copies: int) -> Tensor:
        batch = zoext.repeat({"x": self.x, "y": self.y}, copies)
        losses = nn.functional.cross_entropy(self.model(batch["x"]).float(), batch["y"], reduction="none")
        return zoext.mean_per_copy(losses, copies)

    closure = of_copies  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_over_a_run(monkeypatch: pytest.MonkeyPatch, recipe: str, dtype: torch.dtype) -> None:
    class Graph(RecordedGraph):
        captures = replays = 0

    monkeypatch.setattr(graphs, "CudaGraph", Graph)
    eager = BatchedRun(recipe, graphed=False, dtype=dtype).steps(range(STEPS))
    graphed = BatchedRun(recipe, graphed=True, dtype=dtype).steps(range(STEPS))
    assert Graph.captures == 1
    assert Graph.replays >= STEPS - 6
    assert same(graphed.result(), eager.result())
