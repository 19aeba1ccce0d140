"""The script of docs/profiling.md runs as printed and shows what the page says that it shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zoext._runtime.profiling import Phase

PAGE = Path(__file__).parents[2] / "docs" / "profiling.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
def test_the_script(tmp_path: Path) -> None:
    script = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Optimizer.step#MeZO.step" in done.stdout
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    seen = {(event.get("name"), event.get("cat")) for event in events}
    assert {(phase, "user_annotation") for phase in Phase} <= seen
    assert ("zoext::noise_copy_", "cpu_op") in seen
