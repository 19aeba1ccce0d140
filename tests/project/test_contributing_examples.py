"""The worked examples of CONTRIBUTING.md are all that a new update and a new rule take."""

from __future__ import annotations

import re
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import zoext
from zoext import ops

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
RULES = Path("core") / "rules.h"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the page is not beside the tests")


def example(language: str, name: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if re.search(rf"^(class|struct) {name}\b", block, re.MULTILINE))
    return found


def python_class(name: str) -> Any:
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(example("python", name), name, "exec", dont_inherit=True), namespace)
    return namespace[name]


def test_a_linear_update_is_one_file() -> None:
    kind = python_class("ClippedSGD")
    ends = []
    for slope, update in ((5.0, kind(limit=2.0)), (2.0, zoext.SGD()), (5.0, zoext.SGD())):
        theta = nn.Parameter(torch.ones(40, dtype=torch.float64))
        z = zoext.noise.normal((40,), seed=zoext.noise.step_seed(0, 0)).double()
        weights = slope * z / (z * z).sum()
        optimizer = zoext.ZerothOrderOptimizer([theta], update=update, lr=0.1, weight_decay=0.5)
        optimizer.step(lambda theta=theta, weights=weights: (theta * weights).sum())
        ends.append(theta.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=0)
    assert not torch.allclose(ends[0], ends[2])
    with pytest.raises(ValueError, match="limit must be at least 0, not -1"):
        kind(limit=-1)


MAIN = """
#include <cstdio>
#include "cpu/loops/instruction_set.h"

namespace zoext::cpu::scalar {
extern const InstructionSet instruction_set;
}

int main() {
  using namespace zoext;
  static_assert(Rules::count == 4);
  const auto& rule = cpu::scalar::instruction_set.fp32.rules[3];
  float m[cpu::tile_alignment], v[cpu::tile_alignment], change[cpu::tile_alignment];
  for (int i = 0; i < cpu::tile_alignment; ++i) m[i] = float(i), v[i] = 9.0f;
  rule.move({-8.0f, 1.0f, 0.0f}, m, v, cpu::tile_alignment, change);
  for (int i = 0; i < cpu::tile_alignment; ++i)
    if (change[i] != -2.0f * float(i)) return 1;
  std::printf("%s", Rules::names[3]);
}
"""


@pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler called c++")
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the C++ sources are not beside the tests")
def test_a_rule_is_one_functor(tmp_path: Path) -> None:
    """In a copy of the sources with the functor and its entry in the list, and no other change."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc" / RULES
    text, count = re.subn(
        r"(?=\}  // namespace rules)", lambda _: example("cpp", "OuterAdam") + "\n", header.read_text()
    )
    assert count == 1
    text, count = re.subn(r"(using Rules = RuleList<.*?)>;", r"\1, rules::OuterAdam>;", text, flags=re.DOTALL)
    assert count == 1
    header.write_text(text)
    (tmp_path / "main.cpp").write_text(MAIN)
    sources = [tmp_path / "main.cpp", tmp_path / "csrc" / "cpu" / "loops" / "isa_scalar.cpp"]
    options = [
        "-std=c++17",
        "-O0",
        "-ffp-contract=off",
        "-w",
        f"-I{tmp_path / 'csrc'}",
        "-o",
        tmp_path / "main",
    ]
    subprocess.run(["c++", *map(str, options), *map(str, sources)], check=True)
    assert (
        subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout == "outer_adam"
    )


class _Recorder(zoext.Gaussian):
    calls: ClassVar[list[tuple[Any, ...]]] = []

    def window_(self, parameters: Any, window: Any, rule: Any, lr: Any, eps: Any, decay: Any) -> None:
        self.calls.append((window, rule, eps))


def test_a_rule_takes_one_file_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    members = {rule.name: rule.value for rule in ops.Rule} | {"OUTER_ADAM": 3}
    monkeypatch.setattr(ops, "Rule", IntEnum("Rule", members))
    update = python_class("OuterAdam")(betas=(0.5, 0.75), horizon=2, eps=0.5)
    theta = nn.Parameter(torch.ones(3))
    optimizer = zoext.ZerothOrderOptimizer([theta], direction=_Recorder(), update=update, probe="inplace")
    for _ in range(2):
        optimizer.step(lambda: theta.sum())
    window, rule, eps = _Recorder.calls[-1]
    assert rule == 3
    assert eps == 0.5
    assert_weights(window.first_weights, [1 / 3, 2 / 3])
    assert_weights(window.second_weights, [3 / 7, 4 / 7])


def assert_weights(weights: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(weights, torch.tensor(expected))
