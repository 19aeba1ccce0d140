"""What goes wrong and is the user's to put right."""

from __future__ import annotations

import importlib.util


class UserError(Exception):
    """Shown as one line, without a traceback; the exit code is 2. The message names the remedy."""


def require(modules: tuple[str, ...], extra: str) -> None:
    """Raises a UserError that names the extra of this package which brings the missing ``modules``."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}, not installed here: pip install 'zoext[{extra}]'")
