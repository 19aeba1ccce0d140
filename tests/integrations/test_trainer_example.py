"""The example runs offline, learns, records, and is short."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer.py"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not beside the tests")


def test_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    options = (
        "--max_steps 60 --learning_rate 1e-2 --per_device_train_batch_size 20 --report_to none --use_cpu"
    )
    quiet = "--disable_tqdm True --save_strategy no --dataloader_pin_memory False"
    line = ["trainer.py", "--output_dir", str(tmp_path), *options.split(), *quiet.split()]
    monkeypatch.setattr(sys, "argv", line)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    (losses,) = re.findall(r"^loss (\d\.\d+) -> (\d\.\d+)$", capsys.readouterr().out, re.MULTILINE)
    before, after = map(float, losses)
    assert after < 0.9 * before
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 61
