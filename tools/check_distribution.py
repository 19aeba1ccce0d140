"""Checks that the sdist and the wheel in a folder contain the required files and no others."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

BUILD_FILES = {"LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml", "setup.py"}
METADATA = {"PKG-INFO", "setup.cfg"}


def tracked(*folders: str) -> set[str]:
    """The files that git tracks: others must not be shipped."""
    listing = subprocess.run(["git", "ls-files", "-z", *folders], capture_output=True, text=True, check=True)
    return set(filter(None, listing.stdout.split("\0")))


def compare(archive: Path, held: set[str], wanted: set[str]) -> bool:
    for name in sorted(wanted - held):
        print(f"{archive.name}: {name} is missing", file=sys.stderr)
    for name in sorted(held - wanted):
        print(f"{archive.name}: {name} is stray", file=sys.stderr)
    print(f"{archive.name}: {len(held)} files, {archive.stat().st_size / 1024:.0f} KiB")
    return held == wanted


def check_sdist(path: Path) -> bool:
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    held = {name for name in names if not name.startswith("zoext.egg-info/")}
    return compare(path, held, tracked("zoext", "csrc") | BUILD_FILES | METADATA)


def check_wheel(path: Path) -> bool:
    names = set(zipfile.ZipFile(path).namelist())
    described = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
    metadata = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    libraries = {
        name for name in names if name.startswith(("zoext/_C.", "zoext/_cuda.")) and name.endswith(".so")
    }
    wanted = tracked("zoext") | {f"{described}/{name}" for name in metadata} | libraries
    held = compare(path, names, wanted)
    if not any(name.startswith("zoext/_C.") for name in libraries):
        print(f"{path.name}: zoext/_C is missing", file=sys.stderr)
        return False
    return held


def main() -> int:
    folder = Path(sys.argv[1])
    sdists, wheels = sorted(folder.glob("*.tar.gz")), sorted(folder.glob("*.whl"))
    if len(sdists) != 1 or len(wheels) != 1:
        print(f"{folder} must hold one sdist and one wheel, not {sdists + wheels}", file=sys.stderr)
        return 1
    good = [check_sdist(sdists[0]), check_wheel(wheels[0])]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
