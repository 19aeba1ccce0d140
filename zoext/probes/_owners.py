"""Which modules own and read the weights that move."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import is_

from torch import Tensor, nn

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext.probes._running import StreamedProbeError

#: Modules that run other code if a weight below them has functions of its own.
SEES_CLASSES = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class Owners:
    """What depends only on the parameter groups and the modules, computed again when these change.

    Attributes:
        own: the parameters that each module owns directly, with the index of their group.
        swapped: those of them that are displaced when the module runs, and not when FSDP2 gathers them.
        sharded: the DTensors among the latter.
        places: for the id of each parameter, the index of its group, and it alone.
        opened: the weights that each module may read while it runs: its own, or all below it.
    """

    def __init__(self) -> None:
        self.own: dict[nn.Module, list[tuple[int, Parameters]]] = {}
        self.swapped: dict[nn.Module, list[tuple[int, Parameters]]] = {}
        self.sharded: dict[nn.Module, list[tuple[str, Tensor]]] = {}
        self.places: dict[int, tuple[int, Parameters]] = {}
        self.opened: dict[nn.Module, list[Tensor]] = {}
        self._positions: dict[int, tuple[int, int]] = {}
        self._groups: list[Parameters] = []
        self._known: list[Parameters] = []  # the groups for which everything was computed
        self._outline: list[tuple[int, list[int]]] = []

    def check(self, modules: Sequence[nn.Module]) -> None:
        """Forgets everything if modules or their parameters were replaced."""
        outline = [(id(module), list(map(id, module._parameters.values()))) for module in modules]
        if outline != self._outline:
            self._outline, self._known = outline, []

    def update(
        self, groups: list[Parameters], modules: Sequence[nn.Module], gathered: Collection[int]
    ) -> bool:
        """Computes everything for ``groups``; returns False if it was known.

        ``gathered`` has the ids of the parameters that FSDP2 gathers.
        """
        if len(groups) == len(self._known) and all(map(is_, groups, self._known)):
            return False
        self._positions = _positions(groups)
        self._groups = groups
        self.own = self._owners(modules)
        self.swapped = self.own
        if gathered:
            kept = {
                module: [id(owner) for _, part in own for owner in part.owners if id(owner) not in gathered]
                for module, own in self.own.items()
            }
            self.swapped = {module: self.take(ids) for module, ids in kept.items() if ids}
        self.sharded = {}
        for module, own in self.swapped.items():
            for _, parameters in own:
                pairs = zip(parameters.names, parameters.owners, strict=True)
                if found := [(name, owner) for name, owner in pairs if shards.is_distributed(owner)]:
                    self.sharded.setdefault(module, []).extend(found)
        self.places = {
            id(owner): (group, parameters.take([position]))
            for group, parameters in enumerate(groups)
            for position, owner in enumerate(parameters.owners)
        }
        self.opened = {
            module: [owner for _, parameters in own for owner in parameters.owners]
            for module, own in self.own.items()
        }
        for module in modules:
            if isinstance(module, SEES_CLASSES):
                below = (tensor for part in module.modules() for tensor in self.opened.get(part, ()))
                self.opened[module] = list({id(tensor): tensor for tensor in below}.values())
        self._known = groups
        return True

    def take(self, parameters: Iterable[int]) -> list[tuple[int, Parameters]]:
        """Those of the parameters with these ids that move, with the index of their group."""
        positions: dict[int, list[int]] = {}
        for parameter in parameters:
            if (place := self._positions.get(parameter)) is not None:
                positions.setdefault(place[0], []).append(place[1])
        return [(group, self._groups[group].take(own)) for group, own in positions.items()]

    def check_shards(self, module: nn.Module) -> None:
        """Raises if a module lacks a DTensor of ``sharded``, since others have gathered it."""
        for name, owner in self.sharded.get(module, ()):
            if all(parameter is not owner for parameter in module._parameters.values()):
                raise StreamedProbeError(
                    f"streamed probe: {name} was gathered by an FSDPModule that is no part of the model of "
                    "the optimizer, so it was not displaced; pass the whole model, to which fully_shard was "
                    "applied"
                )

    def _owners(self, modules: Sequence[nn.Module]) -> dict[nn.Module, list[tuple[int, Parameters]]]:
        owners: dict[nn.Module, list[tuple[int, Parameters]]] = {}
        missing = dict(self._positions)
        for module in modules:
            ids = [id(parameter) for parameter in module._parameters.values()]
            if own := self.take(ids):
                owners[module] = own
            for parameter in ids:
                missing.pop(parameter, None)
        for group, position in missing.values():
            raise ValueError(
                f"streamed probe: {self._groups[group].names[position]} is not a parameter of the module "
                "that is streamed; build the optimizer again after changing the model, or pass "
                "probe='inplace'"
            )
        return owners


def _positions(groups: list[Parameters]) -> dict[int, tuple[int, int]]:
    """The group of each parameter, by its id, and the position in it."""
    return {
        id(owner): (group, position)
        for group, parameters in enumerate(groups)
        for position, owner in enumerate(parameters.owners)
    }
