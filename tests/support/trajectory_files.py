"""What tests of trajectories share: runs in files, and hostile lines whose checksums are right."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoext
from support.faulty_runs import FaultyRun
from support.graphed_runs import same
from zoext.trajectory import TrajectoryError
from zoext.trajectory._format.lines import read


def record(
    path: Path, steps: int = 4, recipe: str = "mezo", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, FaultyRun]:
    """A run at ``path``: the model it began with, and the run at its end."""
    run = FaultyRun(recipe, dtype, **options)
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(path, run.optimizer, frames=True):
        run.healthy(steps)
    return base, run


def record_mezo(path: Path) -> tuple[nn.Module, Path]:
    """The model that a run of MeZO began with, a bias frozen since, and its trajectory of four steps."""
    base, _ = record(path)
    base[3].bias.requires_grad_(False)
    return base, path


def records(path: Path) -> list[dict[str, Any]]:
    """What the lines of a file say, without their checksums."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for line in found:
        del line["crc32"]
    return found


def write_bodies(path: Path, bodies: list[bytes]) -> None:
    """Lines ``{...}`` without a checksum, with the right ones."""
    checksum, lines = 0, []
    for body in bodies:
        checksum = zlib.crc32(body[:-1], checksum)
        lines.append(body[:-1] + b',"crc32":"%08x"}\n' % checksum)
    path.write_bytes(b"".join(lines))


def forge(path: Path, line: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the record of a line, from 1, and makes all checksums right again."""
    found = records(path)
    change(found[line - 1])
    write_bodies(path, [json.dumps(record, separators=(",", ":")).encode() for record in found])


def forge_text(path: Path, line: int, old: str, new: str) -> None:
    """Changes the text of a line; what is no JSON any more is possible too."""
    found = [json.dumps(record, separators=(",", ":")) for record in records(path)]
    assert found[line - 1].count(old) == 1, found[line - 1]
    found[line - 1] = found[line - 1].replace(old, new)
    write_bodies(path, [body.encode() for body in found])


def steps_in(path: Path) -> list[int]:
    """The steps that a file has complete and intact."""
    return [line.record["step"] for line in read(path)][1:]


def assert_replays(base: nn.Module, path: Path, run: FaultyRun) -> None:
    model = copy.deepcopy(base)
    zoext.replay(model, path)
    assert same(dict(model.named_parameters()), dict(run.model.named_parameters()))


def refused(
    target: nn.Module | zoext.ZerothOrderOptimizer, path: Path, *messages: str, **options: Any
) -> TrajectoryError:
    """The error of a replay, which leaves the target and all files alone."""
    tensors = target.state_dict() if isinstance(target, nn.Module) else {}
    parameters = (
        list(target.parameters())
        if isinstance(target, nn.Module)
        else [tensor for group in target.param_groups for tensor in group["params"]]
    )
    tensors |= {str(number): tensor for number, tensor in enumerate(parameters)}
    before = copy.deepcopy({name: tensor.detach() for name, tensor in tensors.items()})
    flags = [parameter.requires_grad for parameter in parameters]
    files = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(TrajectoryError) as raised:
        zoext.replay(target, path, **options)
    assert same({name: tensor.detach() for name, tensor in tensors.items()}, before)
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == files
    for message in messages:
        assert message in str(raised.value)
    assert len(str(raised.value)) < 1500
    return raised.value
