"""Workers that are no ranks compute the losses of a run; one that dies, is slow or late changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import zoext
from support import environment
from support.engine_runs import EXAMPLES, STEPS, example
from zoext.trajectory import NOISE_FIELD, weights_digest

pytest.importorskip("transformers", reason="the workers run models of transformers")
pytest.importorskip("peft", reason="the workers load adapters with PEFT")
pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Ended(NamedTuple):
    """A run with all kinds of workers: logs by name, exit statuses, and the engine's module."""

    folder: Path
    logs: dict[str, str]
    statuses: dict[str, int]
    engine: Any

    def digest(self, name: str) -> str:
        return self.logs[name].split()[-1]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("engines")
    done = subprocess.run(
        [sys.executable, "-m", "support.engine_runs", str(folder)],
        env=environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1"),
        timeout=400,
        capture_output=True,
        text=True,
    )
    logs = {path.stem: path.read_text() for path in folder.glob("*.log")}
    assert done.returncode == 0, f"{done.stderr}\n{logs}"
    return Ended(folder, logs, json.loads((folder / "ends.json").read_text()), example("inference_engine"))


def local_run(engine: Any, adapters: bool) -> zoext.ZerothOrderOptimizer:
    model = engine.model_of(None)
    optimizer = engine.optimizer_of(model, adapters)
    for step in range(STEPS):
        tokens = engine.batch_of(step)
        optimizer.step(lambda tokens=tokens: model(input_ids=tokens, labels=tokens).loss)
    return optimizer


def test_weights_are_those_of_a_local_run(ended: Ended) -> None:
    local = local_run(ended.engine, adapters=False)
    assert ended.statuses["driver"] == 0, ended.logs
    assert ended.digest("driver") == weights_digest(local)
    assert ended.digest("driver") != weights_digest(
        ended.engine.optimizer_of(ended.engine.model_of(None), False)
    )
    tuned = ended.engine.model_of(str(ended.folder / "pairs" / "tuned"))
    assert weights_digest(ended.engine.optimizer_of(tuned, False)) == weights_digest(local)


def test_a_killed_worker_loses_nothing(ended: Ended) -> None:
    assert ended.statuses["dying"] == -9


def test_a_slow_worker_is_passed_over_and_comes_back(ended: Ended) -> None:
    assert "not taken: " in ended.logs["slow"], ended.logs["slow"]
    assert (ended.statuses["slow"], ended.digest("slow")) == (0, ended.digest("driver"))


def test_a_late_worker_catches_up(ended: Ended) -> None:
    assert (ended.folder / "late").exists()  # it has computed a loss
    for name in ("late", "early"):
        assert (ended.statuses[name], ended.digest(name)) == (0, ended.digest("driver")), ended.logs[name]


def test_another_base_is_refused_by_name(ended: Ended) -> None:
    assert ended.statuses["other base"] == 1
    assert "weights mismatch: model.norm.weight has other weights (1 of 21" in ended.logs["other base"]


def test_adapters_are_near_a_local_run(ended: Ended) -> None:
    assert ended.statuses["adapters"] == ended.statuses["of adapters"] == 0, ended.logs
    assert ended.digest("adapters") == ended.digest("of adapters")
    local = local_run(ended.engine, adapters=True).param_groups[0]["params"]
    tuned = ended.engine.model_of(str(ended.folder / "adapters" / "tuned"))
    base = dict(ended.engine.model_of(None).named_parameters())
    names = [name for name in base if name.endswith("_proj.weight")]
    assert len(names) == len(local) == 14
    for name, expected in zip(names, local, strict=True):
        moved, wanted = tuned.get_parameter(name) - base[name], expected - base[name]
        assert (moved - wanted).norm() < 1e-2 * wanted.norm(), name


class Page(NamedTuple):
    """A board that is served, with a round of two probes open."""

    url: str
    board: Any
    losses: list[torch.Tensor]

    def post(self, answer: Any) -> tuple[int, str]:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + "/loss", data), timeout=30
            ) as reply:
                return reply.status, json.loads(reply.read())["error"]
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


@pytest.fixture
def page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Page]:
    engine = example("inference_engine")
    model = engine.model_of(None)
    (tmp_path / "base").mkdir()
    board = engine.Board(tmp_path, engine.optimizer_of(model, False), timeout=0.3)
    losses: list[torch.Tensor] = []
    with zoext.Trajectory(board.path, board.optimizer), engine.serving(board, "127.0.0.1", 0):
        board.begin_step(0)
        orders = [{"probe": probe, "round": 1, "pairs": []} for probe in range(2)]
        waiting = threading.Thread(target=lambda: losses.append(board.evaluate(orders)), daemon=True)
        waiting.start()
        yield Page(capsys.readouterr().out.strip(), board, losses)
        board.losses |= {0: 0.0, 1: 0.0}  # lets it end
        waiting.join(30)


def answer_to(order: dict[str, Any], page: Page, **changes: Any) -> dict[str, Any]:
    names = ("run", "noise_field", "step", "round", "checksum", "probe")
    digest = weights_digest(page.board.optimizer)
    return {name: order[name] for name in names} | {"worker": "a", "loss": 2.5, "digest": digest} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "other"}, "run is"),
        ({"noise_field": NOISE_FIELD + 1}, f"noise_field is {NOISE_FIELD}, not {NOISE_FIELD + 1}"),
        ({"step": 1}, "step is 0, not 1"),
        ({"round": 0}, "round is 1, not 0"),
        ({"checksum": "00000000"}, "checksum is"),
        ({"digest": "0" * 32}, "its weights are not those of step 0"),
        ({"probe": 2}, "probe 2 is not open"),
        ({"probe": True}, "probe must be an integer"),
        ({"loss": "2.5"}, "loss a float or null"),
        ({"worker": None}, "worker a string"),
    ],
)
def test_answers_of_another_place_do_not_count(changes: dict[str, Any], message: str, page: Page) -> None:
    order = page.board.lease("a")
    status, error = page.post(answer_to(order, page, **changes))
    assert status == 409
    assert message in error
    assert not page.board.losses


def test_a_loss_counts_once(page: Page) -> None:
    """Also if two workers had the probe, and whichever of them answers first."""
    first, second = page.board.lease("a"), page.board.lease("b")
    assert (first["probe"], second["probe"], first["compare"]) == (0, 1, True)
    again = {}
    while not again:  # after the timeout both are free
        again = page.board.lease("c")
    assert again["probe"] == 0
    assert page.post(answer_to(again, page, worker="c", loss=1.25)) == (200, "")
    assert page.post(answer_to(first, page)) == (409, "probe 0 is not open")
    assert page.post(answer_to(second, page, worker="b", loss=None)) == (200, "")
    while not page.losses:
        pass
    assert page.losses[0][0] == 1.25
    assert torch.isnan(page.losses[0][1])


def test_a_refused_worker_gets_no_more_probes(page: Page) -> None:
    order = page.board.lease("a")
    page.post(answer_to(order, page, digest=""))
    assert "its weights are not" in page.board.lease("a")["error"]
    assert page.board.lease("b")["probe"] == order["probe"]  # at once, not after the timeout


def test_what_arrives_is_bounded(page: Page) -> None:
    assert page.post(b" " * 2**17)[0] == 413
    assert page.post(b"[1]") == (409, "an answer is an object of JSON")
    assert page.post(b"{" * 1000) == (409, "an answer is an object of JSON")
    assert page.get("/base/../run.jsonl")[0] == page.get("/base/%2e%2e")[0] == 404
    assert page.get("/trajectory/-1/5")[0] == 404
    assert page.get("/trajectory/3/8") == (200, page.board.path.read_bytes()[3:8])
