"""The members of an elastic group may be slow, fail and join, and all that remain have the same weights."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import zoext
from support import environment
from support.elastic_runs import flat, loss, model
from support.graphed_runs import RECIPES
from zoext._runtime.randomness import RandomState
from zoext.distributed import ElasticGroup
from zoext.distributed._decisions import Identity, Place, Post, Rules
from zoext.distributed._ledger import Ledger

SETTINGS: dict[str, Any] = {"lr": 3e-3, "mu": 1e-2, "weight_decay": 0.1, "seed": 5}


@pytest.mark.parametrize("shares", ["batches", "probes"])
def test_kills_delays_and_joins_lose_nothing(shares: str, tmp_path: Path) -> None:
    """Every decision is that of losses at the right weights, and all weights follow from the decisions."""
    pytest.importorskip("safetensors", reason="the frames of trajectories are written with it")
    ended = subprocess.run(
        [sys.executable, "-m", "support.elastic_runs", shares, str(tmp_path)],
        env=environment(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TORCH_CPP_LOG_LEVEL="ERROR"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    assert sum(counts.values()) >= 25
    assert min(counts.values()) >= 6


Act = Callable[[int, zoext.ZerothOrderOptimizer, nn.Module], Any]


def in_threads(count: int, act: Act, recipe: str = "mezo", **options: Any) -> list[Any]:
    """What ``act(member, optimizer, model)`` returns or raises in each of the members."""
    store = distributed.HashStore()
    found: list[Any] = [None] * count
    nets = [model() for _ in range(count)]  # before the threads, which share torch's generator

    def run(member: int) -> None:
        net = nets[member]
        given = {"deadline": 3.0, **options}
        try:
            group = ElasticGroup(store, members=count, member=member, **given)
            found[member] = act(member, RECIPES[recipe](net, process_group=group, **SETTINGS), net)
        except Exception as error:
            found[member] = error

    threads = [threading.Thread(target=run, args=(member,)) for member in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "agzo" not in name])
def test_probes_of_a_round_equal_one_process(recipe: str) -> None:
    def train(member: int, optimizer: zoext.ZerothOrderOptimizer, net: nn.Module) -> list[float]:
        for step in range(5):
            optimizer.step(lambda step=step: loss(net, "probes", step, 0))
        return flat(net)

    alone = model()
    expected = train(0, RECIPES[recipe](alone, process_group=None, **SETTINGS), alone)
    assert in_threads(3, train, recipe, shares="probes") == [expected] * 3
    assert expected != flat(model())


@pytest.mark.parametrize("recipe", ["mezo", "greedy", "gv"])
def test_batches_of_their_own_are_averaged(recipe: str) -> None:
    rows = [1, 2, 3]

    def batch(net: nn.Module, step: int, member: int) -> Tensor:
        x = torch.randn(rows[member], 7, generator=torch.Generator().manual_seed(10 * step + member))
        return net(x).square().mean()

    def train(member: int, optimizer: zoext.ZerothOrderOptimizer, net: nn.Module) -> list[float]:
        for step in range(5):
            optimizer.step(lambda step=step: (batch(net, step, member), rows[member]))
        return flat(net)

    alone = model()
    plain = RECIPES[recipe](alone, process_group=None, **SETTINGS)
    for step in range(5):
        plain.step(
            lambda step=step: torch.tensor(
                math.fsum(float(batch(alone, step, each)) * rows[each] for each in range(3)) / 6,
                dtype=torch.float64,
            ).float()
        )
    assert in_threads(3, train, recipe) == [flat(alone)] * 3


def test_a_lost_member_raises_on_all_within_the_deadline_if_asked() -> None:
    def act(member: int, optimizer: zoext.ZerothOrderOptimizer, net: nn.Module) -> tuple[str, float]:
        optimizer.step(lambda: loss(net, "batches", 0, member))
        before, began = flat(net), time.monotonic()
        if member == 1:
            return "", 0.0
        with pytest.raises(RuntimeError) as raised:
            optimizer.step(lambda: loss(net, "batches", 1, member))
        assert flat(net) == before
        return str(raised.value), time.monotonic() - began

    for found in in_threads(3, act, lost="raise", deadline=1.0)[::2]:
        message, seconds = found
        assert "at step 1, member 1 did not answer within the deadline. No weight has moved" in message
        assert seconds < 10  # the deadline is one; a busy machine adds


@pytest.mark.parametrize("lost", ["continue", "raise"])
def test_a_closure_that_raises_is_told_or_left_out(lost: str) -> None:
    def act(member: int, optimizer: zoext.ZerothOrderOptimizer, net: nn.Module) -> list[float]:
        def closure() -> Tensor:
            if member == 2 and optimizer.param_groups[0]["step"] == 1 and not failed:
                failed.append(1)
                raise ValueError("no data")
            return loss(net, "batches", optimizer.param_groups[0]["step"], member)

        failed: list[int] = []
        optimizer.step(closure)
        if member == 2 or lost == "raise":
            match = (
                "no data"
                if member == 2
                else "at step 1, member 2 failed: its closure raised ValueError: no data"
            )
            with pytest.raises(ValueError if member == 2 else RuntimeError, match=match):
                optimizer.step(closure)
        while optimizer.param_groups[0]["step"] < 5:
            optimizer.step(closure)
        return flat(net)

    first, *others = in_threads(3, act, "greedy", lost=lost)
    assert isinstance(first, list), first
    assert others == [first] * 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "other weights"),
        ("lr", r"other options \(lr, mu, weight_decay\)"),
        ("seed", "another recipe, seed or version"),
        ("pair", "closures that return other things"),
    ],
)
def test_a_member_that_differs_is_named(what: str, message: str) -> None:
    def act(member: int, optimizer: zoext.ZerothOrderOptimizer, net: nn.Module) -> str:
        odd = member == 1
        if odd and what == "weights":
            with torch.no_grad():
                net[0].bias[2] += 1e-3
        elif odd and what in {"lr", "seed"}:
            optimizer.param_groups[0][what] *= 2
        before = flat(net)
        with pytest.raises(RuntimeError) as raised:
            optimizer.step(
                lambda: (
                    (loss(net, "batches", 0, member), 1)
                    if odd and what == "pair"
                    else loss(net, "batches", 0, member)
                )
            )
        assert flat(net) == before
        if odd:
            with pytest.raises(RuntimeError, match="member 1 is not one of this run"):
                optimizer.step(lambda: loss(net, "batches", 0, member))
        return str(raised.value)

    for found in in_threads(3, act, lost="raise")[::2]:
        assert isinstance(found, str), found
        assert "member 1 failed: it has" in found

    def goes_on(member: int, optimizer: zoext.ZerothOrderOptimizer, net: nn.Module) -> str:
        if member == 1:
            return act(member, optimizer, net)
        optimizer.step(lambda: loss(net, "batches", 0, member))
        return str(optimizer.last_estimate.missing)

    found = in_threads(3, goes_on)
    assert found[::2] == ["4", "4"], found
    assert "member 1 is not one of this run: it has" in str(found[1])
    assert re.search(message, str(found[1]))


def test_a_loss_that_is_not_finite_anywhere_moves_no_member() -> None:
    def act(member: int, optimizer: zoext.ZerothOrderOptimizer, net: nn.Module) -> bool:
        before = flat(net)
        with pytest.raises(FloatingPointError):
            optimizer.step(lambda: loss(net, "batches", 0, member) * (math.nan if member else 1))
        return flat(net) == before

    assert in_threads(2, act) == [True, True]


def test_several_estimates_of_a_step_and_asking_are_refused() -> None:
    optimizer = zoext.MeZO(model(), process_group=alone_in(distributed.HashStore()), **SETTINGS)
    with pytest.raises(RuntimeError, match=r"ask\(\) is for one process"):
        optimizer.ask()
    net = optimizer.engine.module
    optimizer.estimate(lambda: loss(net, "batches", 0, 0))
    with pytest.raises(
        RuntimeError, match="takes one estimate a step; evaluate all micro-batches in one closure"
    ):
        optimizer.estimate(lambda: loss(net, "batches", 1, 0))


def alone_in(store: Any, **options: Any) -> ElasticGroup:
    return ElasticGroup(store, members=1, member=0, **options)


def test_a_number_and_a_name_are_taken_once() -> None:
    store = distributed.HashStore()
    alone_in(store)
    with pytest.raises(ValueError, match=r"has had the number 0 before. Pass member=None .* or another name"):
        alone_in(store)
    alone_in(store, name="another run")
    assert [ElasticGroup(store, members=1).member for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 6}, "another recipe, seed or version"),
        ({"samples": 3}, "another recipe, seed or version"),
        ({"lr": 1.0}, r"other options \(lr, mu, weight_decay\)"),
    ],
)
def test_who_follows_another_run_is_told(options: dict[str, Any], message: str) -> None:
    store = distributed.HashStore()
    net, other = model(), model()
    optimizer = zoext.MeZO(net, process_group=alone_in(store), **SETTINGS)
    optimizer.step(lambda: loss(net, "batches", 0, 0))
    late = zoext.MeZO(other, process_group=ElasticGroup(store, members=1), **{**SETTINGS, **options})
    with pytest.raises(RuntimeError, match=f"this member has {message} than the run"):
        late.step(lambda: loss(other, "batches", 0, 1))
    assert flat(other) == flat(model())


def test_an_interrupted_member_goes_on_with_the_step_of_the_others() -> None:
    def act(member: int, optimizer: zoext.ZerothOrderOptimizer, net: nn.Module) -> list[float]:
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            if member == 1 and calls in (2, 9):
                raise KeyboardInterrupt
            return loss(net, "batches", optimizer.param_groups[0]["step"], member)

        while optimizer.param_groups[0]["step"] < 5:
            try:
                optimizer.step(closure)
            except KeyboardInterrupt:
                assert member == 1
        return flat(net)

    first, *others = in_threads(3, act, "greedy", deadline=0.5)
    assert isinstance(first, list), first
    assert others == [first] * 2


def test_one_that_joins_while_an_estimate_begins_again_is_compared() -> None:
    """Its weights are looked at before its losses count."""
    rules = Rules()
    posts = {number: Post({0: 1.0, 1: 2.0}) for number in (0, 1)}
    found = rules.decide(Place(3, 0, 1), 2, (0, 1, 2), posts, joining=[7], announced=1)
    assert found.restarts
    assert (found.members, found.joining) == ((0, 1), (7,))
    again = rules.decide(Place(3, 1, 0), 2, found.members, posts, joining=found.joining, announced=1)
    assert (again.members, again.joining, again.next_members) == ((0, 1), (7,), (0, 1, 7))


def test_a_digest_of_one_member_alone_is_not_compared() -> None:
    known = Identity(3, 4, 0)
    posts = {0: Post({0: 1.0}, identity=known._replace(weights=77)), 1: Post({0: 2.0}, identity=known)}
    assert Rules().decide(Place(0), 1, (0, 1), posts).failed == {}
    posts[2] = Post({0: 2.0}, identity=known._replace(weights=78))
    assert Rules().decide(Place(0), 1, (0, 1, 2), posts).failed == {2: "it has other weights than the others"}


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.3)


@pytest.mark.parametrize("seeds", ["other", "equal", "none"])
def test_members_that_draw_other_random_numbers_are_named(seeds: str) -> None:
    """Each member has a turn at the one generator of this process."""
    known = Identity(3, 4, 0)
    posts = {}
    x = torch.ones(4, 7)
    for member in range(3):
        torch.manual_seed(member if seeds == "other" and member == 2 else 0)
        net = Dropping().train(seeds != "none")
        before = RandomState()
        loss = net(x) if seeds != "none" else net.layer(x)
        drawn = RandomState().digest() if before.read_since() else None
        posts[member] = Post({member: float(loss.detach().sum())}, identity=known._replace(random=drawn))
    found = Rules(shares="probes").decide(Place(0), 3, (0, 1, 2), posts)
    expected = {2: "it has drawn other random numbers than the others"} if seeds == "other" else {}
    assert found.failed == expected


def test_dropout_is_told_to_the_other_members() -> None:
    net = Dropping()
    group = alone_in(distributed.HashStore(), shares="probes")
    optimizer = zoext.MeZO(net, process_group=group, **SETTINGS)
    told = []
    exchanged = optimizer.engine.ranks.exchanged
    optimizer.engine.ranks.exchanged = lambda share, seeds: (
        told.append(share.random) or exchanged(share, seeds)
    )
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        optimizer.step(lambda: net(torch.ones(4, 7)).square().mean())
    net.eval()
    net.forward = lambda x: net.layer(x)
    optimizer.step(lambda: net(torch.ones(4, 7)).square().mean())
    assert told[0] == told[1] != told[2]
    assert told[3] is None


def test_an_announcement_is_written_in_one_operation() -> None:
    ledger = Ledger(distributed.HashStore(), "run")
    for member in (9, 4, 9):
        ledger.announce(member)
    assert ledger.announced(0) == ([9, 4, 9], 3)
    assert ledger.announced(2) == ([9], 3)
    assert Ledger(distributed.HashStore(), "run").announced(0) == ([], 0)


def test_a_process_that_is_too_late_must_replay() -> None:
    store = distributed.HashStore()
    net = model()
    optimizer = zoext.MeZO(net, process_group=ElasticGroup(store, members=1, member=0), **SETTINGS)
    for step in range(3):
        optimizer.step(lambda step=step: loss(net, "batches", step, 0))
    store.delete_key("zoext/run/decision/0/0/0")  # as after 10,000 steps
    late = zoext.MeZO(model(), process_group=ElasticGroup(store, members=1), **SETTINGS)
    with pytest.raises(
        RuntimeError, match=r"this member is at step 0 and the run at step 2.*replay its trajectory"
    ):
        late.step(lambda: loss(net, "batches", 0, 1))


def test_what_cannot_be_shared_is_refused() -> None:
    group = ElasticGroup(distributed.HashStore(), members=2, member=1)
    with pytest.raises(ValueError, match=r"probes in place .* elastic group"):
        zoext.MeZO(model(), probe="inplace", process_group=group)
    with pytest.raises(ValueError, match="not the activations that this direction depends on"):
        zoext.AGZO(model(), process_group=group)
    with pytest.raises(ValueError, match="probe_group: process_group is an ElasticGroup"):
        zoext.MeZO(model(), process_group=group, probe_group=group)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the members of an ElasticGroup read their losses on the host"):
        zoext.GraphedStep(zoext.MeZO(model(), process_group=group), lambda: torch.zeros(()))
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(zoext.MeZO(model(), process_group=group))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members"),
        ({"member": 2}, r"member must be in 0 .. 1, or None to join a run, not 2"),
        ({"shares": "losses"}, "shares must be 'batches' or 'probes'"),
        ({"lost": "skip"}, "lost must be 'continue' or 'raise'"),
        ({"deadline": 0.0}, "deadline must be positive and finite, not 0.0"),
        ({"clip": math.inf}, "clip must be positive and finite"),
        ({"timeout": -1.0}, "timeout must be positive and finite"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticGroup(distributed.HashStore(), **{"members": 2, "member": 0, **options})
