"""Members of an elastic group that are killed, stopped and joined by others while they train."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import zoext
from support import environment  # noqa: F401  (the package sets the paths)
from zoext.distributed import ElasticGroup
from zoext.distributed._decisions import Decision, Place
from zoext.distributed._ledger import Ledger
from zoext.trajectory import last_whole_step

MEMBERS, EVENTS, DEADLINE = 4, 26, 0.3
RECORDS = 3  # the member that is never killed; it is not the one that decides at first
SETTINGS: dict[str, Any] = {"lr": 3e-3, "mu": 1e-2, "weight_decay": 0.1, "seed": 5}
RECIPES = {
    "batches": lambda net, **options: zoext.AdaMeZO(net, horizon=3, **SETTINGS, **options),
    "probes": lambda net, **options: zoext.MeZO(net, samples=5, **SETTINGS, **options),
}


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3))


def loss(net: nn.Module, shares: str, step: int, member: int) -> Tensor:
    batch = 100 * step + (member if shares == "batches" else 0)
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(batch))
    return net(x).square().mean()


def flat(net: nn.Module) -> list[float]:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).tolist()


def connected(port: int) -> Any:
    return distributed.TCPStore("localhost", port, is_master=False, timeout=timedelta(seconds=60))


def train(shares: str, port: int, folder: Path, member: int | None, replays: bool) -> None:
    """The program of a member: one records, and some that join replay its record."""
    store = connected(port)
    group = ElasticGroup(store, members=MEMBERS, member=member, shares=shares, deadline=DEADLINE, timeout=60)
    store.set(f"member/{os.getpid()}", str(group.member))
    net = model()
    optimizer = RECIPES[shares](net, process_group=group)
    path = folder / "run.jsonl"
    if replays:
        zoext.replay(optimizer, path, to_step=last_whole_step(path))
    recording = zoext.Trajectory(path, optimizer) if member == RECORDS else None
    began, evaluated = optimizer.param_groups[0]["step"], 0

    def closure() -> Tensor:
        nonlocal evaluated
        evaluated += 1
        time.sleep(5e-3)
        return loss(net, shares, step, group.member)

    while True:
        step = optimizer.param_groups[0]["step"]
        if store.check(["last"]) and step >= int(store.get("last")):
            break
        optimizer.step(closure)
    if recording is not None:
        recording.close()
    found = {
        "member": group.member,
        "began": began,
        "evaluated": evaluated,
        "step": step,
        "weights": flat(net),
    }
    (folder / f"{group.member}.json").write_text(json.dumps(found))


class Churn:
    """Starts members, and kills, stops and adds some while they train."""

    def __init__(self, shares: str, folder: Path) -> None:
        self._shares, self._folder = shares, folder
        self._random = random.Random(11)
        self._store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._live: list[int] = []  # process ids
        self.counts = {"killed": 0, "stopped": 0, "joined": 0}

    def run(self) -> None:
        for member in range(MEMBERS):
            self._start(member)
        self._recorder = self._live[RECORDS]
        ledger = Ledger(self._store, "run")
        self._wait_for(lambda: (ledger.latest() or 0) >= 3)
        for _ in range(EVENTS):
            self._event()
            time.sleep(self._random.uniform(0.02, 0.25))
        self._wait_for(lambda: self._all_take_part(ledger))
        self._store.set("last", str((ledger.latest() or 0) + 30))
        for child in self._live:
            _, status = os.waitpid(child, 0)
            assert status == 0, os.waitstatus_to_exitcode(status)
        audit(self._shares, ledger, self._folder)

    def _event(self) -> None:
        kinds = ["stopped"] + ["killed"] * (len(self._live) > 3) + ["joined"] * (len(self._live) < 6)
        kind = min(kinds, key=lambda kind: (self.counts[kind], self._random.random()))
        self.counts[kind] += 1
        if kind == "joined":
            self._start(None, replays=self.counts[kind] % 2 == 0)
            return
        child = self._random.choice([child for child in self._live if child != self._recorder])
        if kind == "killed":
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self._live.remove(child)
        else:
            os.kill(child, signal.SIGSTOP)
            time.sleep(DEADLINE * self._random.uniform(0.2, 2))
            os.kill(child, signal.SIGCONT)

    def _start(self, member: int | None, replays: bool = False) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                train(self._shares, self._store.port, self._folder, member, replays)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        self._live.append(child)

    def _all_take_part(self, ledger: Ledger) -> bool:
        decision = ledger.decision(Place(ledger.latest() or 0))
        members = set(decision.members) if decision is not None else set()
        return all(
            self._store.check([key]) and int(self._store.get(key)) in members
            for key in (f"member/{child}" for child in self._live)
        )

    @staticmethod
    def _wait_for(is_there: Any) -> None:
        end = time.monotonic() + 60
        while not is_there():
            assert time.monotonic() < end
            time.sleep(0.01)


def decisions(ledger: Ledger, step: int) -> Iterator[tuple[Place, Decision]]:
    """Those of a step in order."""
    place = Place(step)
    while (decision := ledger.decision(place)) is not None:
        yield place, decision
        is_next = not decision.restarts and ledger.decision(place._replace(round=place.round + 1)) is not None
        place = place._replace(round=place.round + 1) if is_next else Place(step, place.estimate + 1)


def audit(shares: str, ledger: Ledger, folder: Path) -> None:
    """Takes all steps again, and compares every decision with the losses that its members must have had."""
    net = model()
    optimizer = RECIPES[shares](net, process_group=None)
    latest = ledger.latest()
    assert latest is not None
    missing = 0
    for step in range(latest + 1):
        pending = optimizer.ask()
        for _, decision in decisions(ledger, step):
            assert decision.error is None
            if decision.restarts:
                continue
            assert pending is not None
            expected = []
            for index in range(len(pending)):
                with pending.displaced(index):
                    members = decision.members if shares == "batches" else (0,)
                    terms = [float(loss(net, shares, step, member)) for member in members]
                expected.append(math.fsum(terms) / len(terms))
            pairs = list(zip(decision.losses, expected, strict=True))
            assert all(math.isnan(found) or found == right for found, right in pairs)
            gaps = sum(math.isnan(found) for found, _ in pairs)
            assert gaps == 0 or shares == "probes"
            missing += gaps
            told = [None if math.isnan(found) else torch.tensor(found) for found in decision.losses]
            if gaps < len(told):
                pending = optimizer.tell(told)
        assert pending is None
        optimizer.step()
    weights = flat(net)
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert len(found) >= 3
    assert all(each["weights"] == weights and each["step"] == latest + 1 for each in found)
    again = model()
    zoext.replay(again, folder / "run.jsonl")
    assert flat(again) == weights
    if shares == "probes":
        assert missing > 0  # rounds went on without some probes
    joined = [each for each in found if each["member"] >= MEMBERS]
    assert all(each["evaluated"] > 0 for each in joined)  # who came late took part


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = Churn(sys.argv[1], Path(sys.argv[2]))
    run.run()
    print(json.dumps(run.counts))
