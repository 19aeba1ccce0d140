"""Help needs neither torch nor transformers; programs that import zoext get everything at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoext
from support import environment

SCRIPT = "import sys\nfrom zoext.cli import main\nsys.exit(main())\n"
HEAVY = {"torch", "transformers", "numpy", "datasets", "matplotlib"}


def ended(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment(**variables), capture_output=True, text=True, timeout=120
    )


def imported(report: str) -> set[str]:
    """The packages in what ``-X importtime`` prints."""
    names = [
        line.rpartition("|")[2].strip() for line in report.splitlines() if line.startswith("import time")
    ]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "finetune  "),
        (["--version"], 0, f"zoext {zoext.__version__}\n"),
        ([], 2, "finetune  "),
        (["fintune"], 2, "fintune: there is no such command; did you mean 'finetune'?"),
        (["--colour"], 2, "required: COMMAND"),
    ],
)
def test_help(arguments: list[str], code: int, said: str) -> None:
    process = ended(["-X", "importtime", "-m", "zoext", *arguments])
    assert process.returncode == code
    assert said in (process.stderr if code else process.stdout)
    assert "zoext" in imported(process.stderr)
    assert not imported(process.stderr) & HEAVY


def test_help_of_the_installed_script(tmp_path: Path) -> None:
    (tmp_path / "zoext").write_text(SCRIPT, encoding="utf-8")
    process = ended(["-X", "importtime", str(tmp_path / "zoext"), "--version"])
    assert process.stdout == f"zoext {zoext.__version__}\n"
    assert not imported(process.stderr) & HEAVY


def test_one_process_of_torchrun_answers() -> None:
    said = [ended(["-m", "zoext"], RANK=rank, WORLD_SIZE="2") for rank in ("0", "1")]
    assert [process.returncode for process in said] == [2, 2]
    assert [bool(process.stderr) for process in said] == [True, False]


def test_a_program_gets_all_names_at_once() -> None:
    assert set(zoext.__all__) <= vars(zoext).keys()


def test_a_package_that_imports_zoext_gets_all_names_at_once(tmp_path: Path) -> None:
    """Also while ``python -m`` locates its module, as for the command."""
    (tmp_path / "zoext_user").mkdir()
    (tmp_path / "zoext_user" / "__init__.py").write_text("import zoext\nfound = set(vars(zoext))\n")
    (tmp_path / "zoext_user" / "__main__.py").write_text(
        "import zoext, zoext_user\nprint(set(zoext.__all__) <= zoext_user.found)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    assert ended(["-m", "zoext_user", "zoext"], PYTHONPATH=path).stdout == "True\n"


def test_the_command_has_the_same_names_and_threads_that_wait_passively(tmp_path: Path) -> None:
    """The policy is a variable that torch reads while it is imported."""
    (tmp_path / "zoext").write_text(
        "import os, sys, zoext\n"
        "from zoext.cli import main\n"
        "assert 'torch' not in sys.modules and not hasattr(zoext, '__wrapped__')\n"
        "assert main(['info']) == 0 and 'torch' in sys.modules\n"
        "from zoext import *\n"
        "print(*sorted(zoext.__all__))\n"
        "print(MeZO.__name__, callable(zoext.noise.signed), hasattr(zoext, 'nothing'))\n"
        "print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    variables = environment()
    variables.pop("OMP_WAIT_POLICY", None)
    script = [sys.executable, str(tmp_path / "zoext")]
    process = subprocess.run(script, env=variables, capture_output=True, text=True, timeout=120)
    names, kinds, policy = process.stdout.splitlines()[-3:]
    assert names == " ".join(sorted(zoext.__all__))
    assert kinds == "MeZO True False"
    assert policy == "passive"
