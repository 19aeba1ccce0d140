"""An estimate is made without the losses that did not come back, which are told as None."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

SETTINGS: dict[str, Any] = {"lr": 0.1, "mu": 1e-2, "seed": 5, "process_group": None}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).double()


def losses_of(net: nn.Module, pending: Any) -> list[Tensor]:
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
    found = []
    for index in range(len(pending)):
        with pending.displaced(index):
            found.append(net(x).square().mean())
    return found


def told(estimator: Any, missing: tuple[int, ...]) -> tuple[zoext.ZerothOrderOptimizer, list[Tensor]]:
    """An optimizer that was told the losses of the first round but some; and all of these."""
    torch.manual_seed(3)
    net = model()
    optimizer = zoext.ZerothOrderOptimizer(net, estimator=estimator, **SETTINGS)
    pending = optimizer.ask()
    first = losses_of(net, pending)
    pending = optimizer.tell([None if i in missing else loss for i, loss in enumerate(first)])
    while pending is not None:
        pending = optimizer.tell(losses_of(net, pending))
    optimizer.step()
    return optimizer, first


def test_a_central_difference_averages_the_others() -> None:
    optimizer, losses = told(zoext.CentralDifference(samples=4), (1, 4))  # of the first and third direction
    estimate = optimizer.last_estimate
    slopes = [float(losses[2 * k] - losses[2 * k + 1]) / 2e-2 for k in range(4)]
    expected = [0.0, slopes[1] / 2, 0.0, slopes[3] / 2]
    torch.testing.assert_close(estimate.coefficients, torch.tensor(expected), rtol=1e-6, atol=0)
    heard = torch.stack([loss for i, loss in enumerate(losses) if i not in (1, 4)])
    torch.testing.assert_close(estimate.loss, heard.mean().float())
    torch.testing.assert_close(estimate.loss_std, heard.std().float())
    assert (estimate.missing, estimate.forwards, bool(estimate.finite)) == (2, 6, True)


def test_a_forward_difference_averages_the_others() -> None:
    optimizer, losses = told(zoext.ForwardDifference(samples=3), (2,))
    expected = [float(losses[k] - losses[0]) / 1e-2 / 2 if k != 2 else 0.0 for k in range(1, 4)]
    torch.testing.assert_close(
        optimizer.last_estimate.coefficients, torch.tensor(expected), rtol=1e-6, atol=0
    )
    assert (optimizer.last_estimate.missing, optimizer.last_estimate.forwards) == (1, 3)


@pytest.mark.parametrize("estimator", [zoext.GreedyPool(pool_size=4), zoext.GreedyPool(4, reuse=False)])
def test_a_pool_chooses_among_the_others(estimator: zoext.GreedyPool) -> None:
    _, losses = told(estimator, ())
    best = int(torch.stack(losses).argmin())
    optimizer, _ = told(estimator, (best,))
    second = int(torch.stack([loss if i != best else loss + 1 for i, loss in enumerate(losses)]).argmin())
    seeds = optimizer.last_estimate.seeds.tolist()
    first_step = zoext.noise.step_seed(5, 0, second)
    assert seeds == [first_step - 2**64 if first_step >= 2**63 else first_step]
    assert optimizer.last_estimate.missing == 1
    assert bool(optimizer.last_estimate.finite)


def test_a_guiding_vector_leaves_a_candidate_out() -> None:
    optimizer, losses = told(zoext.GuidingVector(pool_size=4), (2,))
    order = sorted((i for i in range(4) if i != 2), key=lambda i: float(losses[i]))
    coefficients = optimizer.last_estimate.coefficients
    slope = coefficients[order[0]] / 0.5
    expected = torch.zeros(4)
    expected[order[0]] = expected[order[1]] = slope * 0.5  # the two best
    expected[order[2]] = -slope  # the only one left of the others
    torch.testing.assert_close(coefficients, expected)
    assert float(slope) != 0
    assert optimizer.last_estimate.missing == 1


@pytest.mark.parametrize(
    ("estimator", "missing"),
    [
        (zoext.CentralDifference(), (1,)),
        (zoext.CentralDifference(samples=2), (0, 3)),
        (zoext.ForwardDifference(samples=2), (0,)),  # the centre
    ],
)
def test_too_few_losses_begin_the_estimate_again(estimator: Any, missing: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    net, alone = model(), model()
    alone.load_state_dict(net.state_dict())
    optimizer, plain = (
        zoext.ZerothOrderOptimizer(each, estimator=estimator, **SETTINGS) for each in (net, alone)
    )
    pending = optimizer.ask()
    again = optimizer.tell([None if i in missing else loss for i, loss in enumerate(losses_of(net, pending))])
    assert torch.equal(again.coefficients, pending.coefficients)
    assert torch.equal(again.seeds, pending.seeds)
    assert optimizer.tell(losses_of(net, again)) is None
    optimizer.step()
    assert plain.tell(losses_of(alone, plain.ask())) is None
    plain.step()
    assert all(map(torch.equal, net.parameters(), alone.parameters()))
    assert optimizer.last_estimate.missing == 0


def test_a_later_round_of_a_pool_cannot_miss_losses() -> None:
    net = model()
    optimizer = zoext.ZerothOrderOptimizer(net, estimator=zoext.GuidingVector(pool_size=3), **SETTINGS)
    pending = optimizer.ask()
    last = optimizer.tell(losses_of(net, pending))
    again = optimizer.tell([None, losses_of(net, last)[1]])
    assert len(again) == 3
    assert torch.equal(again.coefficients, pending.coefficients)


def test_nothing_at_all_is_refused() -> None:
    optimizer = zoext.ZerothOrderOptimizer(model(), **SETTINGS)
    optimizer.ask()
    with pytest.raises(ValueError, match="losses: all are None; tell those that came back, or call cancel"):
        optimizer.tell([None, None])
