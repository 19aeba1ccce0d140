"""A run that was interrupted and resumed ends with the bits of one that was not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.graphed_runs import same
from support.tiny_models import labelled, tiny_bert
from zoext.cli import main
from zoext.cli._restoring import newest_checkpoint
from zoext.cli._runs.records import read_metrics
from zoext.cli._runs.training import Training
from zoext.trajectory import OwnedFile

STEPS = 24


@pytest.fixture(scope="module", params=["weights", "trajectory"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    model, data = tiny_bert(folder / "model"), labelled(folder / "words.jsonl")
    options = "--lr 0.003 --mu 0.002 --weight-decay 0.1 --batch-size 7 --seed 5 --device cpu --quiet"
    return [
        *("--model", str(model), "--data", str(data), "--steps", str(STEPS)),
        *("--eval-every", "6", "--checkpoint-every", "5", "--checkpoint", request.param, *options.split()),
    ]


@pytest.fixture(scope="module")
def uninterrupted(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(["finetune", *inputs, "--out", str(out)]) == 0
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    weights, wanted = (load_file(run / "model" / "model.safetensors") for run in (out, expected))
    assert weights.keys() == wanted.keys()
    for name in wanted:
        assert same(weights[name], wanted[name]), name
    records, others = (read_metrics(run / "metrics.jsonl") for run in (out, expected))
    for record in records + others:
        record.pop("seconds", None)  # the only thing that may differ
    assert records == others
    assert (out / "trajectory.jsonl").read_bytes() == (expected / "trajectory.jsonl").read_bytes()


def test_every_step_is_recorded_once(uninterrupted: Path) -> None:
    records = read_metrics(uninterrupted / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if "valid_loss" in record] == [0, 6, 12, 18, 24]
    assert records[-1]["forwards"] == 2 * STEPS


def test_weights_move(inputs: list[str], uninterrupted: Path) -> None:
    before = load_file(Path(inputs[1]) / "model.safetensors")
    after = load_file(uninterrupted / "model" / "model.safetensors")
    assert not any(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize("failing_step", [1, 5, 13])
def test_after_an_exception(
    inputs: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing_step: int,
) -> None:
    one_step = Training._one_step

    def fails(self: Training) -> object:
        if self.step == failing_step:
            raise MemoryError
        return one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_one_step", fails)
        with pytest.raises(MemoryError):
            main(["finetune", *inputs, "--out", str(tmp_path / "run")])
    assert main(["finetune", "--out", str(tmp_path / "run"), "--resume", "--quiet"]) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_steps_that_a_resumed_run_takes_again_are_kept_until_it_is_overwritten(
    inputs: list[str], tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["finetune", *inputs, *out, "--steps", "7", "--checkpoint-every", "5"]) == 0
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.rename(tmp_path / newest.name)
    longer = (tmp_path / "run" / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    assert main(["finetune", *out, "--resume", "--quiet", "--steps", "8"]) == 0
    cut = tmp_path / "run" / "trajectory.jsonl.cut"
    assert cut.read_bytes() == b"".join(longer[6:])
    assert main(["finetune", *inputs, *out, "--steps", "2", "--overwrite"]) == 0
    assert not cut.exists()


def test_a_run_that_another_process_writes_is_refused(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["finetune", *inputs, *out, "--steps", "2"]) == 0
    capsys.readouterr()
    with OwnedFile(tmp_path / "run" / "trajectory.jsonl"):
        assert main(["finetune", *out, "--resume", "--quiet", "--steps", "4"]) == 2
    said = capsys.readouterr().err
    assert "trajectory.jsonl: another run is writing it" in said
    assert said.count("\n") == 1


def test_with_more_steps_than_at_first(inputs: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["finetune", *inputs, *out, "--steps", "12"]) == 0
    assert main(["finetune", *out, "--resume", "--quiet", "--steps", str(STEPS)]) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_finished_run_stays_as_it_is(inputs: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["finetune", *inputs, *out]) == 0
    assert main(["finetune", *out, "--resume", "--quiet"]) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_torn_last_line_of_the_metrics_is_dropped(
    inputs: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["finetune", *inputs, *out, "--steps", "10"]) == 0
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 11, "loss": 0.6\n{"step": 12, "lo'[25:])
    assert main(["finetune", *out, "--resume", "--quiet", "--steps", str(STEPS)]) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))


def test_with_the_other_kind_of_checkpoint(inputs: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["finetune", *inputs, *out, "--steps", "12"]) == 0
    for steps, kind in ((18, "trajectory"), (STEPS, "weights")):
        more = ["--steps", str(steps), "--checkpoint", kind]
        assert main(["finetune", *out, "--resume", "--quiet", *more]) == 0
        newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
        assert newest is not None
        assert (newest.saved is None) == (kind == "trajectory")
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("kept", [0, 20, -30])
def test_a_run_that_was_killed_while_it_began(
    inputs: list[str], uninterrupted: Path, tmp_path: Path, kept: int
) -> None:
    """There is no checkpoint, and no trajectory, a partial header, or a partial first step."""
    out = tmp_path / "run"
    assert main(["finetune", *inputs, "--out", str(out), "--steps", "1", "--checkpoint-every", "9"]) == 0
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "model")
    text = (out / "trajectory.jsonl").read_bytes()
    (out / "trajectory.jsonl").unlink()
    (out / ".trajectory.jsonl.9999999.tmp").write_bytes(text[:30])
    if kept:
        (out / "trajectory.jsonl").write_bytes(text[:kept])
    more = ["--steps", str(STEPS), "--checkpoint-every", "5"]
    assert main(["finetune", "--out", str(out), "--resume", "--quiet", *more]) == 0
    assert_same_run(out, uninterrupted)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_after_a_signal(inputs: list[str], tmp_path: Path, number: signal.Signals) -> None:
    endless = [*inputs, "--steps", "1000000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "zoext.cli", "finetune", *endless],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for_steps(process, tmp_path / "run", 30)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"--out {tmp_path / 'run'} --resume" in said
    stopped_at = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    steps = ["--steps", str(stopped_at + 10)]
    assert main(["finetune", "--out", str(tmp_path / "run"), "--resume", "--quiet", *steps]) == 0
    assert main(["finetune", *inputs, *steps, "--out", str(tmp_path / "whole")]) == 0
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "whole")]
    assert all(same(weights[0][name], weights[1][name]) for name in weights[1])
    steps_seen = [
        record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record
    ]
    assert steps_seen == list(range(1, stopped_at + 11))


def wait_for_steps(process: subprocess.Popen[str], out: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "ended before it was interrupted"
        records = read_metrics(out / "metrics.jsonl")
        if records and records[-1]["step"] >= steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {steps} steps in two minutes")
