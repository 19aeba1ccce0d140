"""What needs no torch holds on its own, in C++: see the programs in ``tests/csrc`` for what is checked.

Once optimised, as the package is, and once with the address and undefined-behaviour sanitizers, which see
what a comparison of results cannot: writes past a tile, overflow, misaligned access.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from zoext import _C

PROGRAMS_IN = Path(__file__).parent
CSRC = PROGRAMS_IN.parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "c++")
OPTIONS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", f"-I{CSRC}", "-w"]
# : For each program the sources it is built with beside its own, and the end of what it prints.
PROGRAMS: dict[str, tuple[list[Path], str]] = {
    "test_words": ([], "words"),
    "test_normals": ([], "normals"),
    "test_storage": ([], "numbers of 16 and 24 bits"),
    "test_formulas": ([], "steps and spans"),
    "test_power_iteration": ([], "parts of the power iteration"),
    "test_loops": (
        [
            *sorted(PROGRAMS_IN.glob("loops_*.cpp")),
            *sorted(CSRC.glob("cpu/loops/*.cpp")),
        ],
        " ".join(_C.available_instruction_sets()),
    ),
    "test_chunks": ([], "how launches divide tensors"),
}
BUILDS = {
    "optimised": ["-O2", "-DNDEBUG"],
    "sanitized": ["-O0", "-g0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def has_sanitizers(folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    command = [COMPILER, *BUILDS["sanitized"], str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"there is no C++ compiler called {COMPILER}")
@pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not beside the tests")
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, build: str, tmp_path: Path) -> None:
    if build == "sanitized" and not has_sanitizers(tmp_path):
        pytest.skip(f"{COMPILER} cannot link the sanitizers")
    program = tmp_path / name
    sources, closing_words = PROGRAMS[name]
    sources = [PROGRAMS_IN / f"{name}.cpp", *sources]
    command = [COMPILER, *OPTIONS, *BUILDS[build], *map(str, sources), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(closing_words)
