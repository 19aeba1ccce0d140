"""A thousand members, of whom some are late, lost, dead or new, have the same weights in the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors", reason="the frames of trajectories are written with it")

import zoext
from support.virtual_members import Report, Simulation, Weather, flat, loss, model, same_weights
from zoext.distributed._decisions import Place, Post, Rules

SETTINGS: dict[str, Any] = {"lr": 0.05, "mu": 1e-2, "seed": 5, "process_group": None}


def mezo(net: nn.Module) -> zoext.ZerothOrderOptimizer:
    return zoext.MeZO(net, **SETTINGS)


def test_all_that_remain_have_the_same_weights(tmp_path: Path) -> None:
    weather = Weather(late=0.03, lost=0.01, dies=0.01, joins=15)
    run = Simulation(1000, mezo, Rules(), weather, tmp_path)
    run.run(3)
    members = list(run.members.values())
    assert len(members) == 1000 - run.dead + run.joined
    assert min(run.left_out, run.dead, run.joined) >= 10
    assert same_weights(members)
    again = model()
    zoext.replay(again, tmp_path / "run.jsonl")
    assert torch.equal(flat(again), flat(members[0].net))
    assert not torch.equal(flat(again), flat(model()))


@pytest.mark.parametrize("build", [lambda net: zoext.MeZOGreedy(net, pool_size=3, **SETTINGS), mezo])
def test_rounds_that_lose_members_begin_again(build: Any, tmp_path: Path) -> None:
    """Pools have several rounds, of which all need the losses of the same members."""
    run = Simulation(12, build, Rules(), Weather(late=0.1, dies=0.02, joins=1), tmp_path)
    run.run(12)
    assert run.left_out >= 5
    assert same_weights(list(run.members.values()))


def lies(most: int, size: float) -> Report:
    """The first ``most`` members push along every direction, by losses that differ by ``size``."""
    return lambda number, losses: (
        [size * (-1) ** index for index in range(len(losses))] if 0 < number <= most else losses
    )


def weights_after_a_step(report: Report | None, clip: float | None, folder: Path) -> torch.Tensor:
    folder.mkdir()
    options = {} if report is None else {"report": report}
    run = Simulation(MEMBERS, mezo, Rules(clip=clip), Weather(), folder, **options)
    run.run(1)
    return flat(run.members[1].net)


MEMBERS, LIARS = 40, 4


def test_clipping_bounds_what_liars_can_do(tmp_path: Path) -> None:
    """In a step, f of W members move weights at most lr f/W 2 clip/mu |D| from where honest ones would.

    The slope of each is within clip/mu, as is the one that it had reported if it were honest.
    """
    clip = 0.2
    honest = {each: weights_after_a_step(None, each, tmp_path / f"honest {each}") for each in (clip, None)}
    torch.testing.assert_close(honest[clip], honest[None], rtol=0, atol=1e-5)  # none is clipped
    seed = zoext.noise.step_seed(SETTINGS["seed"], 0)
    direction = torch.cat([zoext.noise.normal(size, seed=seed, key=key) for key, size in ((0, 8), (1, 2))])
    bound = SETTINGS["lr"] * LIARS / MEMBERS * 2 * clip / SETTINGS["mu"] * float(direction.norm())
    moved = {
        size: float(
            (weights_after_a_step(lies(LIARS, size), clip, tmp_path / str(size)) - honest[clip]).norm()
        )
        for size in (1.0, -1e30, math.nan)
    }
    assert max(moved.values()) <= bound
    assert moved[1.0] > bound / 4  # liars do get as far as that
    free = weights_after_a_step(lies(LIARS, 1e6), None, tmp_path / "free") - honest[None]
    assert float(free.norm()) > 1e3 * bound


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_decision_is_that_of_the_formula(clip: float | None) -> None:
    losses = {0: [1.0, 1.2], 3: [2.0, 2.1], 5: [3.0, 9.0]}
    weights = {0: 1.0, 3: 2.0, 5: 50.0}
    posts = {
        number: Post(dict(enumerate(own)), weights[number], sum(own) / 2) for number, own in losses.items()
    }
    found = Rules(clip=clip).decide(Place(7), 2, (0, 3, 5), posts).losses
    if clip is None:
        expected = [(1 + 2 * 2 + 50 * 3) / 53, (1.2 + 2 * 2.1 + 50 * 9) / 53]
    else:  # weights 1, 2, 4; losses as deviations from 1.1, 2.05, 6.0, of which the median is 2.05
        expected = [2.05 + (-0.1 - 2 * 0.05 - 4 * 0.5) / 7, 2.05 + (0.1 + 2 * 0.05 + 4 * 0.5) / 7]
    assert found == pytest.approx(expected, rel=1e-12)


def test_probes_that_did_not_come_back_are_missing() -> None:
    rules = Rules(shares="probes", clip=0.5)
    posts = {0: Post({0: 1.0, 2: 9.0}), 2: Post({1: 1.5})}
    members = (0, 2)
    found = rules.decide(Place(0), 3, members, posts)
    assert found.losses == [1.0, 1.5, 2.0]  # the median is 1.5
    assert found.members == members
    found = rules.decide(Place(0), 3, (0, 2, 4), {0: Post({0: 1.0}), 4: Post({2: 1.25})})
    assert found.losses[::2] == [1.0, 1.25]
    assert math.isnan(found.losses[1])
    assert (found.members, found.lost, found.restarts) == ((0, 4), (2,), False)
    found = rules.decide(Place(0, 0, 1), 3, (0, 2, 4), {0: Post({0: 1.0}), 4: Post({2: 1.25})})
    assert found.restarts
    assert found.losses == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"losses": 3}',
        b'{"losses": {"a": 1}}',
        b"[" * 10**5,
        b'{"losses": {"0": "x"}}',
        b"\xff",
    ],
)
def test_what_is_no_post_counts_as_none(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"no post|Expecting|decode"):
        Post.decoded(text)


def test_a_loss_of_a_probe_that_is_not_its_own_does_not_count() -> None:
    rules = Rules(shares="probes")
    found = rules.decide(Place(0), 2, (0, 1), {0: Post({0: 1.0, 1: 77.0}), 1: Post({1: 2.0})})
    assert found.losses == [1.0, 2.0]
    found = rules.decide(Place(0), 2, (0, 1), {0: Post({0: 1.0}), 1: Post({0: 5.0})})
    assert found.lost == (1,)


def test_losses_of_the_target_fall() -> None:
    """The simulated problem is one that can be learned, so that equal weights are not those of no steps."""
    net = model()
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
    optimizer = mezo(net)
    before = loss(net, x).item()
    for _ in range(40):
        optimizer.step(lambda: loss(net, x))
    assert loss(net, x).item() < before
