"""A run of a wrapped model is replayed on the plain one, and the other way round."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import zoext
from support.graphed_runs import same
from support.trajectory_files import records

Wrap = Callable[[nn.Module], nn.Module]


class Wrapper(nn.Module):
    """No wrapper that zoext knows: the names in it are the model's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._orig_mod = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.module(x)
        return result


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")
    return wrapped


def with_a_compiled_layer(model: nn.Module) -> nn.Module:
    model[0] = compiled(model[0])
    return model


WRAPPERS: dict[str, Wrap] = {
    "plain": lambda model: model,
    "compiled": compiled,
    "a compiled layer": with_a_compiled_layer,
    "distributed": nn.parallel.DistributedDataParallel,
    "both": lambda model: compiled(nn.parallel.DistributedDataParallel(with_a_compiled_layer(model))),
}


@pytest.fixture(autouse=True, scope="module")
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def plain_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 2)))


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def record(model: nn.Module, path: Path) -> list[str]:
    """The names in the file."""
    optimizer = zoext.MeZO(model, lr=1e-2, probe=zoext.StreamedProbe(model))
    losses = iter(range(6))
    with zoext.Trajectory(path, optimizer):
        for _ in range(3):
            # The model is not called: compiled code may not see displaced weights.
            optimizer.ask()
            optimizer.tell([0.01 * next(losses) ** 2 for _ in range(2)])
            optimizer.step()
    return [row["name"] for row in records(path)[0]["groups"][0]["parameters"]]


@pytest.mark.parametrize("of_base", WRAPPERS)
@pytest.mark.parametrize("of_run", WRAPPERS)
def test_wrapped(of_run: str, of_base: str, tmp_path: Path) -> None:
    model, path = WRAPPERS[of_run](plain_model()), tmp_path / "run.jsonl"
    assert record(model, path) == [name for name, _ in plain_model().named_parameters()]
    base = WRAPPERS[of_base](plain_model())
    zoext.replay(base, path)
    assert same(bits(base), bits(model))
    assert not same(bits(base), bits(plain_model()))


def test_resumed_without_the_wrapper(tmp_path: Path) -> None:
    model, path = compiled(plain_model()), tmp_path / "run.jsonl"
    record(model, path)
    fresh = plain_model()
    zoext.Trajectory(path, zoext.MeZO(fresh, lr=1e-2), resume=True).close()


def test_an_optimizer_that_knows_wrapped_names_only(tmp_path: Path) -> None:
    model, path = compiled(plain_model()), tmp_path / "run.jsonl"
    base = compiled(plain_model())
    optimizer = zoext.MeZO(list(model.named_parameters()), lr=1e-2, probe="inplace")
    with pytest.warns(UserWarning, match="inplace"), zoext.Trajectory(path, optimizer):
        optimizer.step(lambda: model(torch.ones(2, 3)).square().mean())
    with pytest.warns(UserWarning, match="near the run"):
        assert zoext.replay(base, path).param_groups[0]["step"] == 1


def test_names_of_other_models_are_their_own(tmp_path: Path) -> None:
    model, path = Wrapper(plain_model()), tmp_path / "run.jsonl"
    base = copy.deepcopy(model)
    assert record(model, path) == [name for name, _ in model.named_parameters()]
    zoext.replay(base, path)
    assert same(bits(base), bits(model))
    with pytest.raises(zoext.TrajectoryError, match=r"model mismatch: 'module\.0\.weight'"):
        zoext.replay(plain_model(), path)
