"""A trajectory takes frozen parameters of every kind that an optimizer takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import zoext
from support.graphed_runs import same
from support.trajectory_files import forge, records

pytestmark = pytest.mark.filterwarnings("ignore:(Sparse CSR|torch.quantize)")


class TwoTensors(torch.Tensor):
    """A tensor of a class of its own, without memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> TwoTensors:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].inner)
        raise NotImplementedError(func)


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.empty(3, 2, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "of a class of its own": lambda: TwoTensors(torch.ones(3)),
}
PLAIN: dict[str, Callable[[], torch.Tensor]] = {
    "int64": lambda: torch.arange(3),
    "bool": lambda: torch.tensor([True, False]),
    "complex64": lambda: torch.ones(3, dtype=torch.complex64),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "not contiguous": lambda: torch.ones(3, 2).t(),
    "scalar": lambda: torch.tensor(2.0),
    "empty": lambda: torch.ones(0, 3),
}


def model_with(frozen: torch.Tensor) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    model.register_parameter("odd", nn.Parameter(frozen, requires_grad=False))
    return model


def record(model: nn.Module, path: Path) -> None:
    optimizer = zoext.MeZO(model, lr=1e-2)
    with zoext.Trajectory(path, optimizer):
        for _ in range(3):
            optimizer.step(lambda: model(torch.ones(2, 3)).square().mean())


def moved(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach() for name, parameter in model.named_parameters() if name != "odd"]


@pytest.mark.parametrize("kind", [*KINDS, *PLAIN])
def test_recorded_and_replayed(kind: str, tmp_path: Path) -> None:
    make = {**KINDS, **PLAIN}[kind]
    model, base, path = model_with(make()), model_with(make()), tmp_path / "run.jsonl"
    record(model, path)
    digests = {row["name"]: row["digest"] for row in records(path)[0]["groups"][0]["parameters"]}
    assert [name for name, digest in digests.items() if not digest] == (["odd"] if kind in KINDS else [])
    zoext.replay(base, path)
    assert same(moved(base), moved(model))
    zoext.Trajectory(path, zoext.MeZO(model_with(make()), lr=1e-2), resume=True).close()


@pytest.mark.parametrize("kind", KINDS)
def test_still_compared_by_shape_and_dtype(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(model_with(KINDS[kind]()), path)
    for other in (torch.ones(3, 4), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(zoext.TrajectoryError, match="model mismatch: odd is"):
            zoext.replay(model_with(other), path)


def test_weights_that_were_there_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(model_with(torch.ones(3, 2)), path)
    with pytest.raises(zoext.TrajectoryError, match="weights mismatch: odd"):
        zoext.replay(model_with(torch.empty(3, 2, device="meta")), path)


def test_what_moves_has_a_digest(tmp_path: Path) -> None:
    model, path = model_with(torch.ones(2)), tmp_path / "run.jsonl"
    base = copy.deepcopy(model)
    record(model, path)
    forge(path, 1, lambda row: row["groups"][0]["parameters"][1].update(digest=""))
    with pytest.raises(zoext.TrajectoryError, match="no digest"):
        zoext.replay(base, path)


def test_a_lazy_one_is_refused_before_there_is_a_file(tmp_path: Path) -> None:
    model, path = model_with(torch.ones(2)), tmp_path / "run.jsonl"
    lazy = copy.deepcopy(model)
    lazy.odd = nn.UninitializedParameter(requires_grad=False)
    with pytest.raises(ValueError, match="odd is lazy and has no shape yet; run the model once"):
        zoext.Trajectory(path, zoext.MeZO(lazy))
    assert not list(tmp_path.iterdir())
    record(model, path)
    with pytest.raises(zoext.TrajectoryError, match="odd is lazy"):
        zoext.replay(lazy, path)
