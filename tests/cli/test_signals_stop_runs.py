"""SIGTERM and Ctrl-C stop a run between two steps, save it and end with the code of the signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support import compare_command, environment, finetune_command
from zoext.cli import main
from zoext.cli._problem import steps
from zoext.cli._ranks import ALONE
from zoext.cli._runs.records import read_metrics
from zoext.cli._terminal import StopRequest

BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


def signal_at_call(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, call: int) -> None:
    """Sends a signal to this process during a step."""
    take, calls = steps.take, 0

    def watched(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(number)
        return take(*arguments)

    monkeypatch.setattr(steps, "take", watched)


def test_sigterm_to_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = finetune_command.prepare(tmp_path, capsys)
    process = subprocess.Popen(
        [sys.executable, "-m", "zoext", *command.arguments("--steps=1000000")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not read_metrics(command.out / "metrics.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert f"zoext finetune --out {command.out} --resume" in out
    assert "Traceback" not in err
    stopped_at = read_metrics(command.out / "metrics.jsonl")[-1]["step"]
    command.works("--resume", f"--steps={stopped_at + 2}")
    whole = tmp_path / "whole"
    command.works(f"--steps={stopped_at + 2}", f"--out={whole}")
    for file in ("model/model.safetensors", "trajectory.jsonl"):
        assert (command.out / file).read_bytes() == (whole / file).read_bytes()


@BOTH
def test_finetune(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = finetune_command.prepare(tmp_path, capsys)
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    signal_at_call(monkeypatch, number, 3)
    assert main(command.arguments("--steps=9")) == code
    said = capsys.readouterr().out
    assert said == f"stopped after step 3; to continue: zoext finetune --out {command.out} --resume\n"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


@BOTH
def test_compare(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = compare_command.prepare(tmp_path, capsys, monkeypatch)
    signal_at_call(monkeypatch, number, 9)  # after the measurements of the cost of a step
    assert main(command.arguments()) == code
    assert capsys.readouterr().out == f"stopped; to continue: zoext compare --out {command.out} --resume\n"


@BOTH
def test_before_the_first_step(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the model is loaded there is nothing to save."""
    command = finetune_command.prepare(tmp_path, capsys)
    monkeypatch.setattr("zoext.cli._commands.finetune.load", lambda *_: signal.raise_signal(number))
    assert main(command.arguments()) == code
    assert capsys.readouterr().err == "zoext: interrupted\n"
    assert not command.out.exists()


def test_repeated_signals() -> None:
    """Schedulers repeat SIGTERM, and torchrun what the terminal sent; a second Ctrl-C ends the run."""
    with StopRequest(ALONE) as stop:
        assert not stop.poll()
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.poll()
        assert stop.exit_code == 143
        time.sleep(1.1)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
