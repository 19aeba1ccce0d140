"""The examples of Lightning, Fabric and Accelerate run offline and learn, and are short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not beside the tests")


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*isinstance.treespec")
@pytest.mark.parametrize(
    ("name", "package"),
    [("lightning_module", "lightning"), ("fabric_loop", "lightning"), ("accelerate_loop", "accelerate")],
)
def test_examples_learn(name: str, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(package)
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 40
    runpy.run_path(str(path), run_name="__main__")
    (accuracy,) = re.findall(r"accuracy (\d\.\d+)", capsys.readouterr().out)
    assert float(accuracy) > 0.9
