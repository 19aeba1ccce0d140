"""Runs whose files have former names of options and lack newer ones are continued to the same bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from support.finetune_command import Command, prepare
from support.trajectory_files import records, write_bodies
from zoext.cli import main

#: Settings that came later.
LATER = (
    "parallel",
    "schedule",
    "lr_end",
    "warmup",
    "mu_schedule",
    "mu_end",
    "keep",
    "demo",
    "patience",
    "gradient_accumulation",
    "log",
)
FORMER = {"paper": "printed", "freeze": "still"}


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def checksum(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def with_former_names(text: str) -> str:
    for new, old in FORMER.items():
        text = text.replace(f'"balance": "{new}"', f'"balance": "{old}"')
        text = text.replace(f'"balance", "{new}"', f'"balance", "{old}"')
    return text.replace('"agzo-freeze"', '"agzo-still"')


def age(out: Path) -> None:
    """Rewrites the files of a run as an earlier version would have written them."""
    trajectory = out / "trajectory.jsonl"
    lines = [json.loads(with_former_names(json.dumps(record))) for record in records(trajectory)]
    write_bodies(trajectory, [json.dumps(line, separators=(",", ":")).encode() for line in lines])
    whole = trajectory.read_bytes()
    for path in (out / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        lines_read = b"".join(whole.splitlines(keepends=True)[: 1 + state["step"]])
        state["trajectory"] = {"bytes": len(lines_read), "sha256": hashlib.sha256(lines_read).hexdigest()}
        if "optimizer" in state:
            aged = with_former_names(json.dumps(state["optimizer"]))
            assert aged != json.dumps(state["optimizer"])
            state["optimizer"] = json.loads(aged)
        del state["checksum"], state["batch_parts"]
        path.write_text(json.dumps({"checksum": checksum(state), **state}))
    note = json.loads(with_former_names((out / "run.json").read_text()))
    for name in LATER:
        del note["settings"][name]
    places = ("model", "data", "valid_data")
    settings = {name: value for name, value in note["settings"].items() if name not in places}
    note["checksum"] = checksum([settings, note["data"]])
    (out / "run.json").write_text(json.dumps(note))


@pytest.mark.parametrize("checkpoint", ["weights", "trajectory"])
@pytest.mark.parametrize("options", ["--optimizer=agzo", "--optimizer=agzo-freeze"])
def test_balances_of_agzo(command: Command, options: str, checkpoint: str) -> None:
    options_of_run = [options, "--record-frames", f"--checkpoint={checkpoint}", "--lr=1e-4"]
    if options == "--optimizer=agzo":
        options_of_run.append("--options=balance=paper")
    whole = command.folder / "whole"
    command.works(*options_of_run, "--steps=5", f"--out={whole}")
    command.works(*options_of_run, "--steps=3")
    age(command.out)
    assert (
        "still" in (command.out / "run.json").read_text()
        or "printed" in (command.out / "run.json").read_text()
    )
    assert '"balance":"paper"' not in (command.out / "trajectory.jsonl").read_text()
    command.works("--resume", "--steps=5")
    expected = (whole / "model" / "model.safetensors").read_bytes()
    assert (command.out / "model" / "model.safetensors").read_bytes() == expected
    replayed = command.folder / "replayed"
    inputs = [str(command.folder / "model"), str(command.out / "trajectory.jsonl")]
    assert main(["replay", *inputs, f"--out={replayed}", "--quiet"]) == 0
    assert (replayed / "model.safetensors").read_bytes() == expected
