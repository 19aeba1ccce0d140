"""Whoever reads a weight outside its module reads displaced values, however he got hold of the weight."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Read = Callable[[nn.Module, zoext.MeZO, list[Tensor]], Any]


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def loss_of(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def squares(tensors: Any) -> Any:
    return sum(tensor.square().sum() for tensor in tensors)


def saved(model: nn.Module, *_: Any) -> Any:
    torch.save(model.state_dict(), file := io.BytesIO())
    file.seek(0)
    return squares(torch.load(file).values())


def derivative(_: nn.Module, __: Any, held: list[Tensor]) -> Tensor:
    with torch.enable_grad():
        loss = (X @ held[0].t()).square().sum()
    return torch.autograd.grad(loss, [held[0]])[0].square().mean()


READS: dict[str, Read] = {
    "a list from before": lambda _, __, held: squares(held),
    "param_groups": lambda _, optimizer, __: squares(optimizer.param_groups[0]["params"]),
    "dict(_parameters)": lambda model, *_: squares(dict(model[0]._parameters).values()),  # type: ignore[index]
    "_parameters.copy()": lambda model, *_: squares(model[0]._parameters.copy().values()),  # type: ignore[index]
    "_parameters | {}": lambda model, *_: squares((model[0]._parameters | {}).values()),  # type: ignore[index]
    "deepcopy": lambda model, *_: 5 * copy.deepcopy(model)(X + 1).square().mean(),
    "pickle": lambda model, *_: 5 * pickle.loads(pickle.dumps(model))(X + 1).square().mean(),
    "torch.save": saved,
    "rows": lambda _, __, held: squares(row for row in held[0]),
    "a list of tensors": lambda _, __, held: torch.cat([tensor.flatten() for tensor in held]).square().sum(),
    "numpy": lambda _, __, held: torch.tensor((held[0].detach().numpy() ** 2).sum()),
    "the host": lambda _, __, held: torch.tensor(float(held[0].sum()) ** 2),
    "forward": lambda model, *_: model[2].forward(torch.ones(4).double()).square().sum(),  # type: ignore[index]
    "vmap": lambda _, __, held: torch.vmap(lambda x: (x @ held[0].t()).sum())(X).square().mean(),
    "autograd.grad": derivative,
}


class Own(nn.Parameter):
    """A user's own class."""


def slopes(probe: str, read: Read, every: int, own: bool = False) -> list[float]:
    model = model_of()
    if own:
        model[0].weight = Own(model[0].weight.detach())
    held: list[Tensor] = list(model.parameters())
    kinds, values = list(map(type, held)), [tensor.detach().clone() for tensor in held]
    optimizer = zoext.MeZO(model, lr=0.0, mu=1e-3, seed=3, probe=probe)
    found = []
    for step in range(1, 2 * every + 1):

        def closure(step: int = step) -> Tensor:
            loss = loss_of(model)
            return loss + read(model, optimizer, held) if step % every == 0 else loss

        optimizer.step(closure)
        assert optimizer.last_estimate is not None
        assert optimizer.last_estimate.forwards == 2
        found.append(float(optimizer.last_estimate.coefficients))
    assert list(map(type, held)) == kinds
    assert probe == "inplace" or all(map(torch.equal, values, held))
    return found


@pytest.mark.parametrize("every", [1, 3], ids=["watched", "not watched"])
@pytest.mark.parametrize("read", READS)
def test_slopes_are_those_of_in_place_probes(read: str, every: int) -> None:
    found, expected = (slopes(probe, READS[read], every) for probe in ("streamed", "inplace"))
    assert found == pytest.approx(expected, rel=1e-6)


def test_weights_of_a_class_of_their_own() -> None:
    read = READS["a list from before"]
    found, expected = (slopes(probe, read, 3, own=True) for probe in ("streamed", "inplace"))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # dynamo's own import
def test_compiled_code_that_reads_a_weight() -> None:
    torch.compiler.reset()
    penalty = torch.compile(lambda weight: weight.square().sum(), backend="eager")
    penalty(torch.ones(4, 5, dtype=torch.float64, requires_grad=True))
    found = slopes("streamed", lambda model, *_: penalty(model[0].weight), 3)  # type: ignore[index]
    expected = slopes("inplace", lambda model, *_: model[0].weight.square().sum(), 3)  # type: ignore[index]
    assert found == pytest.approx(expected, rel=1e-6)


def test_asking_what_a_weight_is_displaces_nothing() -> None:
    model = model_of()
    held = list(model.parameters())

    def closure() -> Tensor:
        model.zero_grad()
        model.requires_grad_(True)
        for p in held:
            assert isinstance(p, nn.Parameter)
            assert (p.requires_grad, p.is_leaf, p.grad) == (True, True, None)
            assert (p.shape, p.ndim, len(p), p.numel()) == (p.size(), p.dim(), p.shape[0], p.nelement())
            assert (p.is_contiguous(), p.is_floating_point(), p in {p}) == (True, True, True)
            assert X.to(p).type_as(p).dtype == p.dtype
        return loss_of(model)

    optimizer = zoext.MeZO(model, probe="streamed")
    for _ in range(3):
        optimizer.step(closure)
    assert "elsewhere" not in optimizer.probe.describe()


def test_copies_are_plain_parameters() -> None:
    model = model_of()
    made: list[Any] = []

    def closure() -> Tensor:
        weight = next(model.parameters())
        made.extend((type(weight)(torch.ones(2)), copy.deepcopy(weight), copy.copy(weight)))
        made.append(pickle.loads(pickle.dumps(weight)))
        made.append(list(copy.deepcopy(model).parameters())[2])
        return loss_of(model)

    zoext.MeZO(model, probe="streamed").step(closure)
    assert {type(each) for each in made} == {nn.Parameter}


def test_classes_are_put_back_when_the_closure_raises() -> None:
    model = model_of()

    def closure() -> Tensor:
        loss_of(model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoext.MeZO(model, probe="streamed").step(closure)
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def test_other_threads_read_theta() -> None:
    model = model_of()
    theta = [parameter.detach().clone() for parameter in model.parameters()]
    read: list[list[Tensor]] = []

    def note() -> None:
        read.append([parameter.detach().clone() for parameter in model.parameters()])

    def closure() -> Tensor:
        thread = threading.Thread(
            target=lambda: read.append([p.detach().clone() for p in model.parameters()])
        )
        thread.start()
        thread.join()
        return loss_of(model)

    zoext.MeZO(model, probe="streamed").step(closure)
    for found in read:
        assert all(map(torch.equal, found, theta))


@pytest.mark.parametrize("train", [False, True])
def test_fast_paths_of_torch_are_taken_as_ever(train: bool) -> None:
    """nn.TransformerEncoder runs other code where a weight has functions of its own."""
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    found: dict[str, list[float]] = {}
    for probe in ("streamed", "inplace"):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2).double().train(train)
        optimizer = zoext.MeZO(model, lr=0.0, mu=1e-3, seed=3, probe=probe)
        for _ in range(3):
            optimizer.step(lambda model=model: model(x)[0, 0, 0].square())
            assert optimizer.last_estimate is not None
            found.setdefault(probe, []).append(float(optimizer.last_estimate.coefficients))
    assert found["streamed"] == pytest.approx(found["inplace"], rel=1e-6)
