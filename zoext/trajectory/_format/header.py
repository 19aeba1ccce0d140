"""The first line of a trajectory: the recipe of the run and the weights that it starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from zoext._engine import Axes, with_current_names
from zoext._parameters import shards
from zoext.noise import NOISE_FIELD
from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory import _optimizers
from zoext.trajectory._format.fields import Fields, VersionError, is_hexadecimal, is_integer, shown

FORMAT = "zoext trajectory"
VERSION = 1

_PIECE = 2**26  # bytes of a digest that are copied from a device at a time


@dataclass(frozen=True)
class RecordedParameter:
    """A parameter of a run.

    Attributes:
        name: its name in the module, or in the optimizer if that was built without a module.
        key: its position among all parameters of the optimizer.
        shape: its shape; of the whole parameter if it is sharded.
        dtype: its dtype, such as ``"torch.float32"``.
        digest: of its weights when recording began; empty for a frozen parameter without plain bits, see
            ``digest``.
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

    @classmethod
    def parse(cls, fields: Fields) -> RecordedParameter:
        shape = fields.list_of("shape", lambda size: is_integer(size, 0, 2**62), "sizes")
        found = fields.text("digest")
        if found and not is_hexadecimal(found, 32):
            raise fields.error(f"digest must be empty or 32 hexadecimal digits, not {shown(found)}")
        key = fields.integer("key", 0, 2**32 - 1)
        return cls(fields.text("name"), key, tuple(shape), _dtype(fields), found)

    def shape_mismatch(self, tensor: Tensor) -> str | None:
        """How the shape or dtype of ``tensor`` differs from that of the run; None if it does not."""
        if is_lazy(tensor):
            return "is lazy and has no shape yet"
        if tuple(tensor.shape) == self.shape and str(tensor.dtype) == self.dtype:
            return None
        ours = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        return f"is {ours}, not {self.dtype.removeprefix('torch.')} {list(self.shape)}"

    def weights_mismatch(self, tensor: Tensor) -> str | None:
        """A message if ``tensor`` has other weights than the run began with. A collective for a DTensor."""
        if not self.digest:
            return None
        return None if digest(tensor) == self.digest else "has other weights"


@dataclass(frozen=True)
class Header:
    """What is known of a run before its first recorded step.

    Attributes:
        recipe: the direction, the estimator and the update, each as its name and its options.
        precision: the ``precision`` of the optimizer.
        seed: the ``seed`` of the optimizer, unsigned.
        step: the number of steps that were taken before recording began.
        frames: whether a side file holds the frames of the steps.
        exact: whether the probe of the run restored the weights bit for bit, so that a replay can
            reproduce its bits.
        groups: the parameters of each group of the optimizer.
        notes: plain data of the caller of ``Trajectory``, which zoext does not read.
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
        """The header of a recording of ``optimizer`` that begins now; digests read all weights once.

        With digests of DTensors it is a collective, in which ``gather`` is the part of ranks that need none.

        Raises:
            ValueError: for a lazy parameter.
        """
        first = optimizer.param_groups[0]
        groups = tuple(
            tuple(RecordedParameter.of(name, key, tensor, digests=digests) for name, key, tensor in group)
            for group in _optimizers.named_groups(optimizer)
        )
        return cls(
            recipe=first["recipe"],
            precision=first["precision"],
            seed=_optimizers.unsigned_seed(optimizer),
            step=first["step"],
            frames=frames,
            exact=optimizer.engine.probe.is_exact,
            groups=groups,
            notes=notes,
        )

    @classmethod
    def parse(cls, record: Any, where: str) -> Header:
        """The header in a JSON record.

        Raises:
            TrajectoryError: if it is not a header.
            VersionError: if it is in another version of the format or of the noise field.
        """
        fields = Fields(record, where)
        if not fields.has("format") or fields.any("format") != FORMAT:
            raise fields.error("is not the header of a zoext trajectory")
        _check_versions(fields)
        groups = tuple(
            tuple(map(RecordedParameter.parse, group.objects("parameters")))
            for group in fields.objects("groups")
        )
        keys = [parameter.key for group in groups for parameter in group]
        if keys != list(range(len(keys))) or not keys:
            raise fields.error("groups must have parameters with the keys 0, 1, 2, ...")
        axes = Fields(fields.mapping("recipe"), f"{where}: recipe")
        return cls(
            recipe=with_current_names({axis: axes.mapping(axis) for axis in Axes._fields}),
            precision=fields.text("precision"),
            seed=fields.hexadecimal("seed"),
            step=fields.integer("step", 0),
            frames=fields.flag("frames"),
            exact=fields.flag("exact"),
            groups=groups,
            notes=fields.mapping("notes"),
        )

    @property
    def defers(self) -> bool:
        """Whether the run held steps back, see ``LowRank(defer=True)``."""
        return self.recipe["direction"].get("defer") is True

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


def _check_versions(fields: Fields) -> None:
    for name, known in (("version", VERSION), ("noise_field", NOISE_FIELD)):
        found = fields.integer(name, 0)
        if found != known:
            raise VersionError(
                f"{fields.where}: {name} is {found}{_writer_of(fields)}, this zoext reads {known}; install "
                "the zoext that wrote it"
            )


def _writer_of(fields: Fields) -> str:
    # In an unknown version the other fields may have any type.
    packages = fields.any("packages") if fields.has("packages") else None
    return f", written by zoext {shown(packages.get('zoext'))}" if isinstance(packages, dict) else ""


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype")
    module, _, dtype = name.partition(".")
    # vars() and not getattr(), which would import the lazy submodules of torch.
    if module != "torch" or not isinstance(vars(torch).get(dtype), torch.dtype):
        raise fields.error(f"dtype must be a torch dtype, not {shown(name)}")
    return name


@torch.no_grad()
def digest(tensor: Tensor) -> str:
    """A hash of the dtype, the shape and the bits of a tensor: 32 hexadecimal digits.

    That of a DTensor is the one of the whole, for which it is a collective. Empty for a tensor of which there
    are no plain bits to read: on the meta device, sparse, quantized, or of a class of its own.
    """
    if not _has_plain_bits(tensor):
        return ""
    tensor = shards.whole(tensor)
    sha256 = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for piece in flat.split(_PIECE):
        sha256.update(piece.cpu().numpy().data)
    return sha256.hexdigest()[:32]


def gather(optimizer: ZerothOrderOptimizer) -> None:
    """Takes part in the collectives of the digests of all parameters, one after the other."""
    for group in _optimizers.named_groups(optimizer):
        for _, _, tensor in group:
            if _has_plain_bits(tensor):
                shards.whole(tensor)


def weights_digest(optimizer: ZerothOrderOptimizer) -> str:
    """A hash of all parameters of an optimizer, to compare those of two processes: 32 hexadecimal digits.

    It reads all weights once, after a merge of what ``LowRank(defer=True)`` holds back. Parameters without
    plain bits, such as frozen quantized ones, do not count, and names do not either.
    """
    optimizer.engine.deferral.look(optimizer.param_groups)
    sha256 = hashlib.sha256()
    for group in _optimizers.named_groups(optimizer):
        for _, _, tensor in group:
            sha256.update(digest(tensor).encode())
    return sha256.hexdigest()[:32]


def _has_plain_bits(tensor: Tensor) -> bool:
    tensor = shards.part_of(tensor)
    is_plain = type(tensor.detach()) is Tensor and tensor.layout == torch.strided
    return is_plain and not (tensor.is_meta or tensor.is_quantized)
