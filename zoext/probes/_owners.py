"""Which modules own and read the weights that move."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

from torch import Tensor, nn

from zoext._parameters.parameters import Parameters

#: Modules that run other code if a weight below them has functions of its own.
SEES_CLASSES = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class Owners:
    """What depends only on the parameter groups and the modules, computed again when these change.

    Attributes:
        own: the parameters that each module owns directly, with the index of their group.
        places: for the id of each tensor, the index of its group, and it alone.
        opened: the weights that each module may read while it runs: its own, or all below it.
    """

    def __init__(self) -> None:
        self.own: dict[nn.Module, list[tuple[int, Parameters]]] = {}
        self.places: dict[int, tuple[int, Parameters]] = {}
        self.opened: dict[nn.Module, list[Tensor]] = {}
        self._groups: list[Parameters] = []
        self._outline: list[tuple[int, list[int]]] = []

    def check(self, modules: Sequence[nn.Module]) -> None:
        """Forgets everything if modules or their parameters were replaced."""
        outline = [(id(module), list(map(id, module._parameters.values()))) for module in modules]
        if outline != self._outline:
            self._outline, self._groups = outline, []

    def update(self, groups: list[Parameters], modules: Sequence[nn.Module]) -> bool:
        """Computes everything for ``groups``; returns False if it was known."""
        if len(groups) == len(self._groups) and all(map(is_, groups, self._groups)):
            return False
        self.own = _owners(groups, modules)
        self.places = {
            id(tensor): (group, parameters.take([position]))
            for group, parameters in enumerate(groups)
            for position, tensor in enumerate(parameters.tensors)
        }
        self.opened = {
            module: [tensor for _, parameters in own for tensor in parameters.tensors]
            for module, own in self.own.items()
        }
        for module in modules:
            if isinstance(module, SEES_CLASSES):
                below = (tensor for part in module.modules() for tensor in self.opened.get(part, ()))
                self.opened[module] = list({id(tensor): tensor for tensor in below}.values())
        self._groups = groups
        return True


def _owners(
    groups: list[Parameters], modules: Sequence[nn.Module]
) -> dict[nn.Module, list[tuple[int, Parameters]]]:
    places = {
        id(tensor): (group, position)
        for group, parameters in enumerate(groups)
        for position, tensor in enumerate(parameters.tensors)
    }
    owners: dict[nn.Module, list[tuple[int, Parameters]]] = {}
    missing = dict(places)
    for module in modules:
        positions: dict[int, list[int]] = {}
        for parameter in module._parameters.values():
            if id(parameter) in places:
                missing.pop(id(parameter), None)
                group, position = places[id(parameter)]
                positions.setdefault(group, []).append(position)
        if positions:
            owners[module] = [(group, groups[group].take(own)) for group, own in positions.items()]
    for group, position in missing.values():
        raise ValueError(
            f"streamed probe: {groups[group].names[position]} is not a parameter of the module that is "
            "streamed; build the optimizer again after changing the model, or pass probe='inplace'"
        )
    return owners
