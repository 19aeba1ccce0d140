"""Curves of ``zoext finetune`` and ``zoext compare``: drawing one takes longer than a tiny run, and few look.

``tests/cli/conftest.py`` leaves them out of every run; a test that looks at one calls ``drawn``.
"""

from __future__ import annotations

import pytest

from zoext.cli._comparison import report
from zoext.cli._runs import results

_DRAWING = ((results, "draw_curve", results.draw_curve), (report, "draw_curves", report.draw_curves))


def left_out(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone, runs draw nothing."""
    for module, name, _ in _DRAWING:
        patch.setattr(module, name, lambda *_: None)


def drawn(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone, runs draw their curves."""
    for module, name, function in _DRAWING:
        patch.setattr(module, name, function)
