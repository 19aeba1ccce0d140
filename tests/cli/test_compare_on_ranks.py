"""``torchrun -m zoext compare`` is one comparison with the figures of one process, also if restarted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.forking_server import Kill
from support.launched_commands import Launcher
from support.tiny_models import labelled, tiny_bert

OPTIONS = (
    "--validation-fraction=0.4 --optimizers=mezo-greedy --forwards=11 --eval-every=5 --seeds=2 "
    "--lr-factors=1 --lr=3e-3 --mu=2e-3 --batch-size=3 --device=cpu --parallel=probes --quiet"
)
MEASURED = ("seconds", "extra_bytes")  # differ between processes


def figures(out: Path) -> list[dict[str, Any]]:
    """The raw records without what was measured, in the order of the runs."""
    assert {path.name for path in out.iterdir()} == {
        "comparison.json",
        "config.toml",
        "runs.jsonl",
        "table.md",
    }
    records = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in record if name not in MEASURED} for record in records]


def test_the_figures_of_one_process(launcher: Launcher, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "model")
    labelled(tmp_path / "words.jsonl")
    command = ["compare", "--model=model", "--data=words.jsonl", *OPTIONS.split()]
    one = launcher.run([*command, "--out=one"], tmp_path, ranks=1)
    kill = Kill("forward", 400)
    two = launcher.run([*command, "--out=two"], tmp_path, kill=kill, on=1, restarts=1)
    assert (one.failed, one.said) == (two.failed, two.said) == ({}, [])
    assert "SIGKILL" in two.err
    assert figures(tmp_path / "two") == figures(tmp_path / "one")
