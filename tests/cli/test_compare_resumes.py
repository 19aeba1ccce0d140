"""A comparison that was interrupted and resumed ends with the figures of one that was not. A finished one
accepts more seeds and other optimizers, and repeats no run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.compare_command import CompareCommand, prepare
from zoext.cli import main
from zoext.cli._comparison.running import Running
from zoext.cli._problem import steps

MEASURED = ("s per 1000 forwards", "extra MiB")  # may differ between processes


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CompareCommand:
    return prepare(tmp_path, capsys, monkeypatch)


def results(command: CompareCommand) -> list[list[dict[str, str]]]:
    tables = command.tables()
    for row in tables[0]:
        for column in MEASURED:
            del row[column]
    return tables


def figures(command: CompareCommand) -> list[dict[str, Any]]:
    """The raw records without times, in the order of the runs."""
    records = [record for record in command.raw if record["record"] != "method"]
    for record in records:
        del record["seconds"]
    return records


@pytest.mark.parametrize("failing_step", [1, 20, 38])
def test_after_an_exception(
    command: CompareCommand, monkeypatch: pytest.MonkeyPatch, failing_step: int
) -> None:
    options = ["--optimizers", "mezo,one-sided", "--lr-factors", "0.5,1"]
    command.works(*options)
    expected = results(command), figures(command)
    take, taken = steps.take, 0

    def fails(*arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken > 8 + failing_step:  # 8 are taken to measure the two optimizers
            raise MemoryError
        return take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "take", fails)
        with pytest.raises(MemoryError):
            main(command.arguments(*options, "--overwrite"))
    assert not (command.out / "table.md").exists()
    whole_runs = [record for record in command.raw if record["record"] == "end"]
    command.works("--resume")
    assert (results(command), figures(command)) == expected
    assert [record for record in command.raw if record["record"] == "end"][: len(whole_runs)] == whole_runs


def test_a_finished_comparison_stays_as_it_is(
    command: CompareCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.works()
    raw, tables = command.raw, command.tables()
    monkeypatch.setattr(Running, "finish", None)
    command.works("--resume")
    assert (command.raw, command.tables()) == (raw, tables)


def test_a_torn_last_line_is_dropped(command: CompareCommand) -> None:
    command.works()
    expected = results(command), figures(command)
    lines = (command.out / "runs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (command.out / "runs.jsonl").write_text("".join(lines[:-1]) + lines[-1][:30], encoding="utf-8")
    command.works("--resume")
    assert (results(command), figures(command)) == expected


def test_more_seeds_and_another_optimizer(command: CompareCommand) -> None:
    more = ["--optimizers", "mezo,signs", "--seeds", "3"]
    command.works("--seeds", "1")
    before = command.raw
    command.works("--resume", *more)
    assert command.raw[: len(before)] == before
    resumed = results(command)
    command.works(*more, "--overwrite")
    assert results(command) == resumed


def test_fewer_optimizers_are_shown_if_asked_for(command: CompareCommand) -> None:
    command.works("--optimizers", "mezo,signs", "--lr-factors", "1")
    raw = command.raw
    command.works("--resume", "--optimizers", "mezo")
    ((row,),) = command.tables()
    assert row["optimizer"] == "mezo"
    assert command.raw == raw


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_after_a_signal(command: CompareCommand, number: signal.Signals) -> None:
    endless = command.arguments("--forwards=2000000", "--eval-every", "20", "--sweep-forwards", "60")
    process = subprocess.Popen(
        [sys.executable, "-m", "zoext.cli", *endless],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_a_final_run(process, command)
    process.send_signal(number)
    said, complaints = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert said == f"stopped; to continue: zoext compare --out {command.out} --resume\n"
        assert complaints == ""
    command.works("--resume", "--forwards", "60")
    resumed = results(command)
    command.works("--forwards", "60", "--sweep-forwards", "60", "--eval-every", "20", "--overwrite")
    assert results(command) == resumed


def wait_for_a_final_run(process: subprocess.Popen[str], command: CompareCommand) -> None:
    """Waits until all sweeps are done and the endless final run has been evaluated."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "ended before it was interrupted"
        if (command.out / "runs.jsonl").is_file():
            lines = (command.out / "runs.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            last = json.loads(lines[-1]) if lines else {}
            if last.get("phase") == "final" and last["forwards"] > 0:
                return
        time.sleep(0.02)
    raise AssertionError("no final run in two minutes")
