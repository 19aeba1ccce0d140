"""Errors and warnings that the user sees."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The environment variable that has the tracebacks of errors printed.
TRACEBACK = "ZOEXT_TRACEBACK"


class UserError(Exception):
    """Printed as one line without a traceback; the exit code is 2. The message names the remedy."""


def wants_traceback() -> bool:
    """Whether the user asked for the tracebacks of errors."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def first_line(error: BaseException) -> str:
    """The first line of an error message of another library."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def warn(text: str) -> None:
    """Prints a warning to stderr, also with --quiet."""
    print(f"zoext: warning: {text}", file=sys.stderr)


@contextmanager
def writing(path: Path, then: str | None = None) -> Iterator[None]:
    """Turns an OSError raised inside the block into a UserError that names ``path`` and the remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        remedy = "fix this or give another --out" if then is None else f"fix this, then {then}"
        raise UserError(f"{path}: {reason}; {remedy}") from None


@contextmanager
def reading() -> Iterator[None]:
    """Turns an OSError about a file that is read into a UserError; see ``writing`` for the others."""
    try:
        yield
    except BrokenPipeError:  # of stdout: nothing that a user could mend
        raise
    except OSError as error:
        raise UserError(f"{error.filename or 'system'}: {error.strerror or error}") from None


def require(modules: tuple[str, ...], extra: str) -> None:
    """Raises a UserError that names the ``extra`` which installs the missing ``modules``."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}, not installed here: pip install 'zoext[{extra}]'")


def missing_package(error: BaseException) -> str | None:
    """Which package to install, if that is what ``error`` is about; None if it is about something else."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    return None if package == "zoext" else f"needs {package}, not installed here: pip install {package}"
