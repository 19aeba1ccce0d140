"""The ``state_dict`` of an optimizer: whether it fits, and whether it would change anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoext._engine.axes import with_current_names
from zoext._parameters.precision import checked_state


def checked(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """``state_dict`` with current names, if it fits an optimizer with ``groups`` and the options ``fixed``.

    Raises:
        ValueError: for a state of another recipe or precision, or of no zoext optimizer.
    """
    loaded: list[dict[str, Any]] = [dict(group) for group in state_dict["param_groups"]]
    for group in loaded:
        if missing := fixed.keys() - group.keys():
            raise ValueError(
                f"state_dict has no {', '.join(sorted(missing))}: it is not that of a zoext optimizer"
            )
        group["recipe"] = with_current_names(group["recipe"])
        if group["recipe"] != fixed["recipe"]:
            raise ValueError(
                f"state_dict comes from the recipe {group['recipe']}, this optimizer has "
                f"{fixed['recipe']}; build it with the same direction, estimator and update"
            )
        if group["precision"] != fixed["precision"]:
            raise ValueError(
                f"state_dict comes from precision={group['precision']!r}, this optimizer has "
                f"{fixed['precision']!r}; build it with the same"
            )
    state = dict(state_dict["state"])
    for own_group, saved in zip(groups, loaded, strict=False):
        for tensor, name in zip(own_group["params"], saved["params"], strict=False):  # torch compares lengths
            if own := state.pop(name, None):
                state[name] = checked_state(tensor, own)
    return {**state_dict, "state": state, "param_groups": loaded}


def same(a: Any, b: Any) -> bool:
    """Whether two nests of plain data hold equal values; tensors may be on different devices."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
