"""JSON that programs read, in any language."""

from __future__ import annotations

import json
import math
from typing import Any


def text_of(record: Any) -> str:
    """``record`` as JSON, with null for numbers that are not finite: NaN and Infinity are not JSON."""
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
