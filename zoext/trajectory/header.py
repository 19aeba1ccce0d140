"""The first line of a trajectory: the recipe, and the weights that it begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from zoext import noise
from zoext._engine.axes import Axes
from zoext._parameters import shards, wrappers
from zoext._parameters.digest import digest
from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory.fields import Fields, VersionError, is_integer, shown

FORMAT = "zoext trajectory"
VERSION = 1
NOISE_FIELD = 2  # raised with every change of a bit of the noise field, of rounding or of an update


@dataclass(frozen=True)
class RecordedParameter:
    """A parameter of a run, and a digest of its weights when recording began.

    The digest is empty for a frozen parameter of a kind that has none; see ``digest``.
    """

    name: str
    key: int
    shape: tuple[int, ...]
    dtype: str
    digest: str

    @classmethod
    def of(cls, name: str, key: int, tensor: Tensor, *, digests: bool) -> RecordedParameter:
        if is_lazy(tensor):
            raise ValueError(f"optimizer: {name} is lazy and has no shape yet; run the model once first")
        found = digest(tensor) if digests else ""
        return cls(name, key, tuple(tensor.shape), str(tensor.dtype), found)

    def unlike(self, tensor: Tensor) -> str | None:
        """How a tensor differs in kind from the parameter of the run, if it does."""
        if is_lazy(tensor):
            return "is lazy and has no shape yet"
        if tuple(tensor.shape) == self.shape and str(tensor.dtype) == self.dtype:
            return None
        ours = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        return f"is {ours}, not {self.dtype.removeprefix('torch.')} {list(self.shape)}"

    def changed(self, tensor: Tensor) -> str | None:
        """Whether its weights differ from those that the run began with. A collective for a DTensor."""
        if not self.digest:
            return None
        return None if digest(shards.whole(tensor)) == self.digest else "has other weights"


@dataclass(frozen=True)
class Header:
    """What is known before the first step.

    ``exact`` tells whether the probes of the run left the weights as they were, bit for bit, so that a replay
    can have those of the run. ``notes`` is plain data of whoever recorded the run; zoext does not read it.
    """

    recipe: Mapping[str, Mapping[str, Any]]
    precision: str
    seed: int
    step: int
    frames: bool
    exact: bool
    groups: tuple[tuple[RecordedParameter, ...], ...]
    notes: Mapping[str, Any]

    @classmethod
    def of(
        cls, optimizer: ZerothOrderOptimizer, frames: bool, notes: Mapping[str, Any], *, digests: bool = True
    ) -> Header:
        """The header of what ``optimizer`` does from now on; digests take a pass over all weights.

        Raises:
            ValueError: for a parameter that is lazy, so that it has no shape yet.
        """
        first = optimizer.param_groups[0]
        groups = tuple(
            tuple(RecordedParameter.of(name, key, tensor, digests=digests) for name, key, tensor in group)
            for group in named_groups(optimizer)
        )
        seed = noise.signed(first["seed"]) % 2**64
        return cls(
            recipe=first["recipe"],
            precision=first["precision"],
            seed=seed,
            step=first["step"],
            frames=frames,
            exact=optimizer._probe.is_exact,
            groups=groups,
            notes=notes,
        )

    def record(self) -> dict[str, Any]:
        groups = [{"parameters": [vars(parameter) for parameter in group]} for group in self.groups]
        return {
            "format": FORMAT,
            "version": VERSION,
            "noise_field": NOISE_FIELD,
            "packages": {name: version(name) for name in ("zoext", "torch")},
            "recipe": self.recipe,
            "precision": self.precision,
            "seed": f"{self.seed:016x}",
            "step": self.step,
            "frames": self.frames,
            "exact": self.exact,
            "groups": groups,
            "notes": self.notes,
        }

    @property
    def parameters(self) -> list[RecordedParameter]:
        return [parameter for group in self.groups for parameter in group]


def parse(record: Any, where: str) -> Header:
    """The header in a record.

    Raises:
        TrajectoryError: if it is none; a VersionError, if it is of another version.
    """
    fields = Fields(record, where)
    if not fields.has("format") or fields.any("format") != FORMAT:
        raise fields.error("is not the header of a trajectory of zoext")
    for name, known in (("version", VERSION), ("noise_field", NOISE_FIELD)):
        found = fields.integer(name, 0)
        if found != known:
            raise VersionError(
                f"{where}: {name} is {found}{_writer_of(fields)}, this zoext reads {known}; install the "
                "zoext that wrote it"
            )
    groups = tuple(tuple(map(_parameter, group.objects("parameters"))) for group in fields.objects("groups"))
    keys = [parameter.key for group in groups for parameter in group]
    if keys != list(range(len(keys))) or not keys:
        raise fields.error("groups must have parameters with the keys 0, 1, 2, ...")
    return Header(
        recipe=_recipe(fields),
        precision=fields.text("precision"),
        seed=hexadecimal(fields, "seed"),
        step=fields.integer("step", 0),
        frames=fields.flag("frames"),
        exact=fields.flag("exact"),
        groups=groups,
        notes=fields.mapping("notes"),
    )


def hexadecimal(fields: Fields, name: str) -> int:
    text = fields.text(name)
    if not is_hexadecimal(text):
        raise fields.error(f"{name} must be 16 hexadecimal digits, not {shown(text)}")
    return int(text, 16)


def is_hexadecimal(value: Any, digits: int = 16) -> bool:
    return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")


def _writer_of(fields: Fields) -> str:
    """What wrote a version that is not known, of which the rest may be anything."""
    packages = fields.any("packages") if fields.has("packages") else None
    return f", written by zoext {shown(packages.get('zoext'))}" if isinstance(packages, dict) else ""


def _parameter(fields: Fields) -> RecordedParameter:
    shape = fields.list_of("shape", lambda size: is_integer(size, 0, 2**62), "sizes")
    found = fields.text("digest")
    if found and not is_hexadecimal(found, 32):
        raise fields.error(f"digest must be empty or 32 hexadecimal digits, not {shown(found)}")
    key = fields.integer("key", 0, 2**32 - 1)
    return RecordedParameter(fields.text("name"), key, tuple(shape), _dtype(fields), found)


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype")
    module, _, dtype = name.partition(".")
    # Not getattr, which would import what torch imports when it is asked for.
    if module != "torch" or not isinstance(vars(torch).get(dtype), torch.dtype):
        raise fields.error(f"dtype must be one of torch, not {shown(name)}")
    return name


def _recipe(fields: Fields) -> dict[str, dict[str, Any]]:
    axes = Fields(fields.mapping("recipe"), f"{fields.where}: recipe")
    return {axis: axes.mapping(axis) for axis in Axes._fields}


def named_groups(optimizer: ZerothOrderOptimizer) -> list[list[tuple[str, int, Tensor]]]:
    """The parameters of each group: name in the module if there is one, key, tensor."""
    module = optimizer._module
    own = wrappers.named_parameters(module) if module is not None else ()
    names = {id(tensor): name for name, tensor in own}
    groups, key = [], 0
    for group in optimizer.param_groups:
        given = group.get("param_names") or [None] * len(group["params"])
        rows = []
        for name, tensor in zip(given, group["params"], strict=True):
            rows.append((names.get(id(tensor)) or name or f"parameter {key}", key, tensor))
            key += 1
        groups.append(rows)
    return groups
