"""A run of many members in one process and in virtual time, by the rules and the ledger of real ones."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import zoext
from zoext.distributed._decisions import Decision, Place, Post, Rules
from zoext.distributed._ledger import Ledger
from zoext.trajectory import last_whole_step

#: The losses that a member reports, of those that it has.
Report = Callable[[int, list[float]], list[float]]


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Linear(4, 2)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def loss(net: nn.Module, batch: Tensor) -> Tensor:
    """How far the outputs are from those of a target that all batches share."""
    return (net(batch) - batch[:, :2].flip(1)).square().mean()


@dataclass
class Weather:
    """What happens to members, by the step; chances are those of each member at each step.

    Attributes:
        late: the chance of an answer after the deadline.
        lost: the chance of an answer that never comes.
        dies: the chance of a death.
        joins: how many members join at each step.
    """

    late: float = 0.0
    lost: float = 0.0
    dies: float = 0.0
    joins: int = 0


@dataclass
class Member:
    """A process: a model, its optimizer, and what it reports."""

    number: int
    net: nn.Module
    optimizer: zoext.ZerothOrderOptimizer
    report: Report
    step: int = field(default=0)

    def losses(self, pending: Any, step: int) -> list[float]:
        batch = torch.randn(3, 4, generator=torch.Generator().manual_seed(10**6 * step + self.number))
        found = []
        for index in range(len(pending)):
            with pending.displaced(index):
                found.append(float(loss(self.net, batch)))
        return self.report(self.number, found)


class Simulation:
    """Members that answer at times drawn at random; whoever is late or lost is left out.

    Args:
        count: members at the beginning.
        build: makes the optimizer of a model.
        rules: of the group.
        weather: what happens to members.
        folder: where the first member records its steps, for those that join.
        report: what members say instead of their losses.
    """

    def __init__(
        self,
        count: int,
        build: Callable[[nn.Module], zoext.ZerothOrderOptimizer],
        rules: Rules,
        weather: Weather,
        folder: Path,
        report: Report = lambda _, losses: losses,
    ) -> None:
        self._build, self._rules, self._weather, self._report = build, rules, weather, report
        self._random = random.Random(5)
        self.ledger = Ledger(distributed.HashStore(), "run")
        self._path = folder / "run.jsonl"
        self.members = {number: self._new(number) for number in range(count)}
        self._recording = zoext.Trajectory(self._path, self.members[0].optimizer)
        self._expected: tuple[int, ...] = tuple(self.members)
        self.left_out = 0
        self.dead = 0
        self.joined = 0

    def run(self, steps: int) -> None:
        for step in range(steps):
            self._step(step)
            self._join(step + 1)
        self._recording.close()

    def _new(self, number: int) -> Member:
        net = model()
        return Member(number, net, self._build(net), self._report)

    def _step(self, step: int) -> None:
        pending = {number: member.optimizer.ask() for number, member in self.members.items()}
        decision: Decision | None = None
        estimate, round_number = 0, 0
        while any(asked is not None for asked in pending.values()):
            place = Place(step, estimate, round_number)
            decision = self._round(place, pending)
            self._expected = decision.members
            if decision.restarts:
                estimate, round_number = estimate + 1, 0
                for number, member in self.members.items():
                    member.optimizer.cancel()
                    pending[number] = member.optimizer.ask()
                continue
            round_number += 1
            told = torch.tensor(decision.losses, dtype=torch.float32)
            for number, member in self.members.items():
                pending[number] = member.optimizer.tell(told)
        assert decision is not None
        for member in self.members.values():
            member.optimizer.step()
            member.step += 1
        self._expected = tuple(sorted(self.members))  # who was left out has taken the step, and asks again

    def _round(self, place: Place, pending: dict[int, Any]) -> Decision:
        """Takes answers in the order of their arrival, and decides when all are there, or at time 1."""
        size = len(next(iter(pending.values())))
        arrivals: list[tuple[float, int]] = []
        for number in self._expected:
            chance = self._random.random()
            if number and chance < self._weather.dies:
                del self.members[number], pending[number]
                self.dead += 1
            elif number and chance < self._weather.dies + self._weather.lost:
                continue
            else:
                is_late = number and self._random.random() < self._weather.late
                heapq.heappush(
                    arrivals, (self._random.uniform(1, 3) if is_late else self._random.random(), number)
                )
        decision = None
        while arrivals:
            time, number = heapq.heappop(arrivals)
            if decision is None and (time >= 1 or not arrivals):
                if time < 1:
                    self._post(place, number, pending)
                decision = self._decided(place, size)
            elif decision is None:
                self._post(place, number, pending)
            else:  # too late: what it proposes does not count
                self._post(place, number, pending)
                again = self.ledger.propose(place, Decision([0.0] * size, (number,)))
                assert again == decision
        assert decision is not None
        self.left_out += len(decision.lost)
        return decision

    def _post(self, place: Place, number: int, pending: dict[int, Any]) -> None:
        losses = self.members[number].losses(pending[number], place.step)
        base = sum(losses) / len(losses)
        self.ledger.post(place, number, Post(dict(enumerate(losses)), base=base))

    def _decided(self, place: Place, size: int) -> Decision:
        posts = self.ledger.posts(place, self._expected)
        return self.ledger.propose(place, self._rules.decide(place, size, self._expected, posts))

    def _join(self, step: int) -> None:
        """New members replay the record of the first one, and take what it does not have from the ledger."""
        for _ in range(self._weather.joins):
            number = self.ledger.new_member(0) + 10**5
            member = self._new(number)
            recorded = last_whole_step(self._path) or 0
            if recorded:
                zoext.replay(member.optimizer, self._path, to_step=recorded)
            for missed in range(recorded, step):
                self._follow(member, missed)
            member.step = step
            self.members[number] = member
            self.joined += 1
        self._expected = tuple(sorted(self.members))

    def _follow(self, member: Member, step: int) -> None:
        pending = member.optimizer.ask()
        place = Place(step)
        while pending is not None:
            decision = self.ledger.decision(place)
            assert decision is not None
            if decision.restarts:
                member.optimizer.cancel()
                pending, place = member.optimizer.ask(), Place(step, place.estimate + 1)
                continue
            pending = member.optimizer.tell(torch.tensor(decision.losses, dtype=torch.float32))
            place = place._replace(round=place.round + 1)
        member.optimizer.step()


def same_weights(members: Sequence[Member]) -> bool:
    return all(torch.equal(flat(members[0].net), flat(member.net)) for member in members)
