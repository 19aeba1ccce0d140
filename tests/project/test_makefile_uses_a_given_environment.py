"""make VENV=none creates and downloads nothing, and needs only torch, NumPy, setuptools and pytest."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import zoext

ROOT = Path(__file__).parents[2]
GIVEN = ("torch", "numpy", "pytest", "setuptools", "packaging")
#: What the last command of a target runs.
TARGETS = {"test-gpu": "-m pytest tests -m cuda", "bench-gpu": "benchmarks/gpu.py"}

pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
    pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs a checkout"),
]


def with_dependencies(*names: str) -> Iterator[Distribution]:
    """The installed packages ``names`` and what they require, without extras."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        yield found
        for requirement in map(Requirement, found.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)


@pytest.fixture(scope="module")
def given_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the packages of ``GIVEN`` only, linked from this environment."""
    folder = tmp_path_factory.mktemp("given")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python3*/site-packages"))
    for found in with_dependencies(*GIVEN):
        for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            source, link = Path(str(found.locate_file(name))), packages / name
            if source.exists() and not link.exists():
                link.symlink_to(source.resolve())
    return folder / "bin" / "python"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def commands_of(target: str, python: str | Path) -> list[str]:
    done = run("make", "--dry-run", target, "VENV=none", f"PYTHON={python}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_created_or_downloaded(target: str) -> None:
    commands = commands_of(target, "the-given-python")
    text = "\n".join(commands)
    assert not re.search(r"\bpip\b|-m venv|/bin/python|stamps|curl|wget", text)
    assert "the-given-python tools/check_environment.py" in commands
    assert "the-given-python setup.py -q egg_info build_ext --inplace" in commands
    assert commands[-1].startswith(f"the-given-python {TARGETS[target]}")


def test_a_virtual_environment_is_the_default() -> None:
    done = run("make", "--dry-run", "--always-make", "test", "VENV=a-folder", "PYTHON=the-given-python")
    assert done.returncode == 0, done.stderr
    assert "the-given-python -m venv a-folder" in done.stdout.splitlines()
    assert "a-folder/bin/python -m pip" in done.stdout


def test_missing_optional_packages_are_listed(given_python: Path) -> None:
    done = run(given_python, "tools/check_environment.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not installed, so what needs them is skipped: ")
    assert {"scipy", "transformers", "pytest-xdist"} <= set(re.split(r": |, |\n", done.stdout))


def test_missing_requirements_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    check = importlib.import_module("check_environment")
    versions = {"numpy": "2.0", "packaging": "25.0", "setuptools": "70.0", "torch": "2.11.0+cu130"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(check, "version", version)
    assert check.main() == 1
    assert "lacks setuptools>=77: install what is missing" in capsys.readouterr().err
    versions["setuptools"] = "81.0"
    assert check.main() == 0
    del versions["numpy"]
    assert check.main() == 1
    assert "lacks numpy: " in capsys.readouterr().err


@pytest.mark.skipif(Path(zoext.__file__).parents[1] != ROOT, reason="zoext is not that of the checkout")
def test_tests_skip_what_needs_a_missing_package(given_python: Path) -> None:
    """On two files, since all take a minute: CI runs the whole target on a simulated GPU."""
    some = ["tests/cuda/ops/test_power_iteration.py", "tests/noise/test_statistics.py"]
    command = commands_of("test-gpu", given_python)[-1].split()
    command[command.index("tests") : command.index("tests") + 1] = some
    done = run(*command, "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scipy is not installed" in done.stdout
    assert "error" not in done.stdout.splitlines()[-1]


@pytest.mark.skipif(Path(zoext.__file__).parents[1] != ROOT, reason="zoext is not that of the checkout")
def test_the_benchmark_needs_no_optional_package(given_python: Path) -> None:
    """It starts, finds out what it can time, and then says that there is no GPU or times it."""
    parts = "import gpu; print(gpu.arguments_of([]).parts)"
    done = run(given_python, "-c", f"import sys; sys.path.insert(0, 'benchmarks'); {parts}")
    assert done.stdout == "('kernels',)\n", done.stderr
