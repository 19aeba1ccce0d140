"""The ``state_dict`` of an optimizer: whether it fits, and whether it would change anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoext._engine.axes import with_current_names
from zoext._parameters.precision import checked_state
from zoext._parameters.shards import part_of


def packed(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` in the form that ``torch.distributed.checkpoint`` can save and load.

    - It loads what a new optimizer has entries for, and looks into dicts and lists for them. A new optimizer
      has no window, so the window would be left out without an error. A tuple is saved and loaded as a
      whole, so the state of an update is in one.
    - Tensors in the tuple come back on the device where they were, which is that of another rank. So they
      are on the host.
    - If a parameter has a state, all must have an entry.
    """
    groups = [
        {**group, "update_state": (_on_host(group["update_state"], {}),)}
        for group in state_dict["param_groups"]
    ]
    state = state_dict["state"]
    if state:
        state = {**{name: {} for group in groups for name in group["params"]}, **state}
    return {**state_dict, "state": state, "param_groups": groups}


def _on_host(value: Any, known: dict[int, Tensor]) -> Any:
    """A copy of plain data with its tensors on the host; a tensor that occurs twice is copied once."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.cpu()
        return known[id(value)]
    if isinstance(value, Mapping):
        return {key: _on_host(entry, known) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(entry, known) for entry in value)
    return value


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
        if not isinstance(group["update_state"], Mapping):  # as it is in the files of earlier versions
            (group["update_state"],) = group["update_state"]
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
        if not both or a.dtype != b.dtype or a.shape != b.shape:
            return False
        a, b = part_of(a), part_of(b)
        return torch.equal(a, b.to(a.device))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
