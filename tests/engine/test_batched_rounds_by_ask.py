"""An optimizer with a batched probe asks for losses as any other, and displaces one probe at a time."""

from __future__ import annotations

import pytest
import torch

import zoext
from support.batched_models import PLAIN, plain


@pytest.mark.parametrize("build", [zoext.MeZO, zoext.LOZO, zoext.AGZO], ids=lambda build: build.__name__)
def test_told_losses_give_the_estimate_of_a_batched_round(build: type[zoext.ZerothOrderOptimizer]) -> None:
    model, losses = plain(PLAIN["mixed"], train=False)
    optimizer = build(model, lr=1e-3, mu=1e-2, seed=3, probe="batched")  # type: ignore[call-arg]
    expected = optimizer.estimate(losses).coefficients
    other, of_other = plain(PLAIN["mixed"], train=False)
    asking = build(other, lr=1e-3, mu=1e-2, seed=3, probe="batched")  # type: ignore[call-arg]
    pending: zoext.OpenRound | None = asking.ask()
    while pending is not None:
        found = []
        for index in range(len(pending)):
            with pending.displaced(index):
                found.append(of_other(1)[0])
        pending = asking.tell(torch.stack(found))
    optimizer.step()
    asking.step()
    torch.testing.assert_close(asking.last_estimate.coefficients, expected, rtol=1e-4, atol=1e-6)


def test_weights_that_are_read_elsewhere_are_refused() -> None:
    class Reads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.child.weight

    model = Reads()
    asked = zoext.MeZO(model, probe="batched").ask()
    with pytest.raises(zoext.BatchedProbeError, match=r"child.weight is read"), asked.displaced(0):
        model(torch.ones(2, 3))
    assert type(model.child.weight) is torch.nn.Parameter
