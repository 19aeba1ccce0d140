"""Checks that zoext can be built in this environment, and lists the optional packages that it lacks.

For make VENV=none, which installs nothing. pyproject.toml says what is required.
"""

import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:
    sys.exit("VENV=none: packaging is missing in this environment: install it, or leave VENV=none out")

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
#: Built with where it is on the PATH, from a package or from the system.
NINJA = "ninja"


def unmet(requirements: list[str]) -> Iterator[Requirement]:
    """The requirements that this environment does not meet; those on zoext itself are left out."""
    for requirement in map(Requirement, requirements):
        if requirement.name == "zoext":
            continue
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                yield requirement
        except PackageNotFoundError:
            yield requirement


def main() -> int:
    document = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    project = document["project"]
    required = [*document["build-system"]["requires"], *project["dependencies"]]
    extras = project["optional-dependencies"]
    missing = sorted({str(requirement) for requirement in unmet(required) if requirement.name != NINJA})
    if missing:
        print(
            f"VENV=none: {sys.executable} lacks {', '.join(missing)}: install what is missing, "
            "or leave VENV=none out to have a virtual environment made",
            file=sys.stderr,
        )
        return 1
    optional = [text for extra in ("test", "demo", "finetune", "machine-code") for text in extras[extra]]
    absent = sorted({requirement.name for requirement in unmet(optional)})
    if shutil.which(NINJA) is None:
        print("ninja is not on the PATH, so files are compiled one after the other")
    if absent:
        print(f"not installed, so what needs them is skipped: {', '.join(absent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
