"""What goes wrong and is the user's to put right."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Shown as one line, without a traceback; the exit code is 2. The message names the remedy."""


def warn(text: str) -> None:
    """Tells the user, also one who wants nothing printed but errors, what a run goes on in spite of."""
    print(f"zoext: warning: {text}", file=sys.stderr)


@contextmanager
def writing(path: Path, then: str | None = None) -> Iterator[None]:
    """What the system refuses inside the block becomes a UserError: ``path``, and what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        remedy = "or give another --out" if then is None else f"then {then}"
        raise UserError(f"{path}: {reason}; put that right{', ' if then else ' '}{remedy}") from None


@contextmanager
def reading() -> Iterator[None]:
    """An OSError of a file that is read becomes a UserError; those that are written have ``writing``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'system'}: {error.strerror or error}") from None


def require(modules: tuple[str, ...], extra: str) -> None:
    """Raises a UserError that names the extra of this package which brings the missing ``modules``."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}, not installed here: pip install 'zoext[{extra}]'")
