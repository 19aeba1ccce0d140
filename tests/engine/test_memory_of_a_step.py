"""An `inplace` step allocates at most 1 MiB beside what the closure allocates, a `streamed` one at most
the largest module's weights plus 1 MiB: every allocation is counted by torch's profiler."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import zoext
from support.allocations import peak_of

MIB = 2**20


def model_of() -> nn.Sequential:
    """24 MiB of float32 weights, the largest module 9 MiB; and buffers that are written to."""
    return nn.Sequential(
        nn.Embedding(3 * 2**18 // 256, 256 * 3),
        nn.Linear(768, 1024),
        nn.BatchNorm1d(1024, affine=False),
        nn.Linear(1024, 2304, bias=False),
    )


def test_the_measurement_sees_what_is_allocated_and_freed() -> None:
    assert peak_of(lambda: [torch.empty(3 * MIB, dtype=torch.uint8).sum() for _ in range(2)]) >= 3 * MIB


@pytest.mark.parametrize("probe", ["inplace", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axes", ["mezo", "forward difference"])
def test_bars(probe: str, dtype: torch.dtype, axes: str) -> None:
    model = model_of().to(dtype).eval()
    weights = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in model]
    assert max(weights) * 2 < sum(weights)
    index = torch.arange(8)

    def closure() -> torch.Tensor:
        return model(index).float().square().mean()

    estimator = zoext.CentralDifference() if axes == "mezo" else zoext.ForwardDifference(samples=2)
    optimizer = zoext.ZerothOrderOptimizer(model, estimator=estimator, probe=probe, weight_decay=0.1)

    def plain() -> None:
        with torch.no_grad():
            closure()

    extra = peak_of(lambda: optimizer.step(closure)) - peak_of(plain)
    if probe == "inplace":
        assert extra <= MIB
        return
    # The scratch buffer stays allocated between steps; it counts all the same.
    scratch = optimizer.engine.probe._swap._scratch.buffers[0].numel()  # type: ignore[attr-defined]
    assert extra + scratch <= max(weights) + MIB
    first = zoext.ZerothOrderOptimizer(model, estimator=estimator, probe=probe)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        first.step(closure)
    sizes = [
        event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    assert max(sizes) <= max(weights) + MIB
