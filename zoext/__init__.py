"""Forward-only (zeroth-order) fine-tuning for PyTorch."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is the command, as ``zoext``, ``python -m zoext`` or ``torchrun -m zoext``."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # while Python locates the module, only the original arguments have its name
        program = sys.orig_argv[-len(sys.argv)].removeprefix("-m").removesuffix(".cli")
    return Path(program).name == "zoext"


# A program gets all names and operators at once. The command imports torch only where it needs it: its help
# must not take seconds, and it sets variables that torch reads while it is imported.
if TYPE_CHECKING or not _is_command():
    from zoext._public import *  # noqa: F403
    from zoext._public import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("zoext._public"), name)
