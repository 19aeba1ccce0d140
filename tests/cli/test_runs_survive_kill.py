"""A run that is killed at any moment, repeatedly, and resumed ends with the bits of an undisturbed run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.forking_server import HALVES, Kill, Server
from support.tiny_models import labelled, tiny_bert

KILLS = 10  # of each of the five runs: 50 moments in all
SEED = 5

RUNS = {
    "weights": "--optimizer=mezo --checkpoint=weights",
    "positions": "--optimizer=mezo --checkpoint=trajectory --dtype=bfloat16 --precision=residual",
    "moments": "--optimizer=adamezo --checkpoint=weights --dtype=bfloat16 --precision=residual",
    "replayed moments": "--optimizer=adamezo --checkpoint=trajectory --dtype=float16",
    "bases": "--optimizer=agzo --record-frames --checkpoint=trajectory --dtype=bfloat16 --precision=residual",
}
COMMON = (
    "--steps=12 --eval-every=4 --checkpoint-every=3 --batch-size=7 --lr=1e-2 --weight-decay=0.1 --device=cpu"
)

killed: list[Kill] = []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.mark.parametrize("name", RUNS)
def test_killed(server: Server, tmp_path: Path, name: str) -> None:
    model, data = tiny_bert(tmp_path / "model"), labelled(tmp_path / "words.jsonl")
    options = [f"--model={model}", f"--data={data}", *RUNS[name].split(), *COMMON.split(), "--quiet"]
    inputs = contents(model)
    in_peace = server.run(["finetune", *options, "--out", str(tmp_path / "whole")])
    assert in_peace.status == 0
    expected = result(tmp_path / "whole")

    chosen = Choice(random.Random(f"{SEED} {name}"), in_peace.calls, in_peace.seconds)
    runs = kills = 0
    while kills < KILLS:
        out = tmp_path / f"run-{runs}"
        runs += 1
        assert runs < 3 * KILLS, "most of the moments do not occur"
        kills += killed_until_it_ends(server, options, out, chosen, KILLS - kills)
        assert result(out) == expected
    assert contents(model) == inputs


def killed_until_it_ends(server: Server, options: list[str], out: Path, chosen: Choice, at_most: int) -> int:
    """Runs and resumes until the run is done; returns how often it was killed."""
    kills = 0
    while True:
        has_begun = (out / "run.json").is_file()
        more = ["--out", str(out), "--quiet", *(["--resume"] if has_begun else options)]
        kill = chosen.kill if kills < at_most else None
        status = server.run(["finetune", *more], kill).status
        assert status in (0, -9), kill
        if status == 0:
            chosen.missed()
            return kills
        assert kill is not None
        kills += 1
        killed.append(kill)
        chosen.next()


class Choice:
    """Draws the moments of one run in random order, each at a random call.

    The first is late in the run and the second during the truncation of the trajectory when it is resumed,
    which an undisturbed run does not have.
    """

    def __init__(self, generator: random.Random, calls: dict[str, int], seconds: float) -> None:
        self._random = generator
        self._calls = calls
        self._seconds = seconds
        self._moments: list[str] = []
        self._next = Kill("shorten", call=1)
        self.kill = Kill("update", call=int(0.8 * calls["update"]))

    def next(self) -> None:
        self.kill = self._next
        if not self._moments:
            self._moments = self._random.sample(["any", *self._calls], 1 + len(self._calls))
        self._next = self._at(self._moments.pop(), 1.0)

    def missed(self) -> None:
        """Tries an earlier call in another run, because a resumed run has fewer calls."""
        self.kill = self._at(self.kill.moment, 0.5)

    def _at(self, moment: str, share: float) -> Kill:
        calls = max(1, int(share * self._calls.get(moment, 1)))
        whens = ["before", "after", *(["half"] if moment in HALVES else [])]
        seconds = self._random.uniform(0, share * self._seconds)
        return Kill(moment, self._random.randint(1, calls), self._random.choice(whens), seconds)


def result(out: Path) -> dict[str, object]:
    """Everything that a run writes, except seconds and the figure, which shows the metrics."""
    assert not list(out.rglob(".*")), "leftovers"
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        record.pop("seconds", None)
    files = [path for path in out.glob("trajectory.*") if path.suffix != ".cut"]
    trajectory = {path.name: path.read_bytes() for path in files}
    return {"model": contents(out / "model"), "metrics": metrics, **trajectory}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_moments_were_of_all_kinds() -> None:
    """Runs last: forward passes, updates, checkpoints and writes of trajectories were all interrupted."""
    if len(killed) < KILLS * len(RUNS):
        pytest.skip("counts the kills of all runs")
    moments = {kill.moment for kill in killed}
    assert moments >= {
        "any",
        "forward",
        "update",
        "fsync",
        "rename",
        "text",
        "tensors",
        "trajectory",
        "shorten",
    }
