"""LOZO: the probe and the update see the same U and V on every step, also where V is drawn anew."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from zoext.ops import Stream

SEED, MU = 9, 1e-3


def factors(
    step: int, rank: int, refresh_interval: int, key: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    u_seed = zoext.noise.step_seed(SEED, step)
    v_seed = zoext.noise.step_seed(SEED, step - step % refresh_interval)
    u = zoext.noise.normal((rank, shape[0]), seed=u_seed, key=key, stream=Stream.LEFT_FACTOR)
    v = zoext.noise.normal((rank, shape[1]), seed=v_seed, key=key, stream=Stream.RIGHT_FACTOR)
    return u.double(), v.double()


class Noting(nn.Linear):
    """Notes the weights it runs with."""

    def __init__(self, *size: int) -> None:
        super().__init__(*size)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.weight.detach().clone())
        return super().forward(x)


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("refresh_interval", [1, 3])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_every_step_moves_along_what_was_probed(probe: str, refresh_interval: int, rank: int) -> None:
    """The published code draws other factors for the update at each refresh."""
    torch.manual_seed(0)
    model = Noting(8, 6).double()
    x, target = torch.randn(5, 8).double(), torch.randn(5, 6).double()
    optimizer = zoext.LOZO(
        model, lr=1e-2, mu=MU, seed=SEED, rank=rank, refresh_interval=refresh_interval, probe=probe
    )
    for step in range(7):
        before = model.weight.detach().clone()
        model.seen.clear()
        optimizer.step(lambda: (model(x) - target).square().mean())
        u, v = factors(step, rank, refresh_interval, 0, (6, 8))
        product = u.T @ v
        for weight, sign in zip(model.seen, (1, -1), strict=True):
            assert torch.allclose(weight - before, sign * MU * product, rtol=1e-6, atol=1e-12)
        assert optimizer.last_estimate is not None
        slope = optimizer.last_estimate.coefficients.double()
        change = model.weight.detach() - before
        assert torch.allclose(change, -1e-2 * slope * product / rank, rtol=1e-5, atol=1e-11)


def test_the_scale_of_the_published_code_leaves_the_rank_out() -> None:
    changes = {}
    for scale in ("paper", "code"):
        torch.manual_seed(0)
        model = nn.Linear(8, 6)
        before = model.weight.detach().clone()
        optimizer = zoext.LOZO(model, lr=1.0, seed=SEED, rank=4, scale=scale)
        optimizer.step(lambda model=model: model(torch.ones(8)).square().mean())
        changes[scale] = model.weight.detach() - before
    assert torch.allclose(changes["code"], 4 * changes["paper"], rtol=1e-5, atol=1e-6)


def test_the_estimate_is_unbiased() -> None:
    """The mean of 4000 estimates of a linear loss's gradient, each of variance about 2 m n: its error is
    normal, and no entry deviates by more than 6 standard errors but once in 10^7 runs."""
    shape, rank, count = (4, 5), 3, 4000
    gradient = torch.arange(20.0).reshape(shape).double() / 10
    total, squares = torch.zeros(shape).double(), torch.zeros(shape).double()
    for step in range(count):
        u, v = factors(step, rank, 1, 0, shape)
        d = u.T @ v
        estimate = (d * gradient).sum() * d / rank
        total += estimate
        squares += estimate**2
    mean = total / count
    error = ((squares / count - mean**2) / count).sqrt()
    assert ((mean - gradient).abs() < 6 * error).all()


def test_vectors_are_dense_and_kernels_are_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(3, 7, 2), nn.Flatten(), nn.Linear(7, 2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = zoext.LOZO(model, lr=1.0, mu=1e-2, seed=SEED, rank=2)
    optimizer.step(lambda: model(torch.ones(1, 3, 2, 2)).square().sum())
    kernel, bias, *_ = (p.detach() - old for p, old in zip(model.parameters(), before, strict=True))
    assert torch.linalg.matrix_rank(kernel.reshape(7, 12).double(), rtol=1e-4) == 2
    assert optimizer.last_estimate is not None
    z = zoext.noise.normal(7, seed=zoext.noise.step_seed(SEED, 0), key=1)
    assert torch.allclose(bias, -optimizer.last_estimate.coefficients * z, rtol=1e-3, atol=1e-5)


def test_numbers_and_empty_matrices_are_no_matrices() -> None:
    """A parameter of no dimensions has dense directions, as vectors have."""
    model = nn.ParameterDict({"scale": torch.tensor(2.0), "none": torch.empty(0, 1), "w": torch.ones(3, 2)})
    optimizer = zoext.LOZO(model, rank=2, lr=1e-2, probe="inplace")
    losses = iter((1.0, 2.0))
    optimizer.step(lambda: next(losses))
    assert model["scale"] != 2
    assert (model["w"] != 1).all()


def test_v_needs_no_state_to_resume() -> None:
    ends = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(8, 6)
        optimizer = zoext.LOZO(model, lr=1e-2, seed=SEED, refresh_interval=4)
        for step in range(11):
            if interrupted and step == 6:  # in the middle of an interval
                state = optimizer.state_dict()
                optimizer = zoext.LOZO(model, refresh_interval=4)
                optimizer.load_state_dict(state)
            optimizer.step(lambda model=model: model(torch.ones(8)).square().mean())
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)


def narrow_model() -> nn.Module:
    torch.manual_seed(0)
    layers = {"wide": nn.Linear(8, 6), "one": nn.Linear(1, 5), "three": nn.Linear(3, 2)}
    return nn.ModuleDict({**layers, "conv": nn.Conv1d(4, 4, 1, groups=4)})


@pytest.mark.parametrize("scale", ["paper", "code"])
def test_the_rank_of_a_narrow_matrix_is_that_of_its_columns(scale: str) -> None:
    """It moves as with the rank of its columns for all; a wider matrix does not notice."""
    ends = {}
    narrow = {
        1: nullcontext(),
        3: pytest.warns(UserWarning, match=r"rank=3 .* columns: one\.weight \(1\), conv\.weight \(1\)$"),
        5: pytest.warns(UserWarning, match=r"\(1\), three\.weight \(3\), conv\.weight \(1\)$"),
    }
    for rank, told in narrow.items():
        model = narrow_model()
        with told:
            optimizer = zoext.LOZO(model, rank=rank, scale=scale, lr=1e-2, seed=SEED, probe="inplace")
        for step in range(3):  # told once: warnings are errors here
            losses = iter((1.0, 2.0 + step))
            optimizer.estimate(lambda losses=losses: next(losses))
            optimizer.step()
        ends[rank] = dict(model.named_parameters())
    for name, rank in {"one.weight": 1, "conv.weight": 1, "three.weight": 3}.items():
        assert torch.equal(ends[5][name], ends[rank][name]), name
    assert not torch.equal(ends[5]["three.weight"], ends[1]["three.weight"])
    assert not torch.equal(ends[5]["wide.weight"], ends[3]["wide.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, not 0"),
        ({"refresh_interval": 0}, "refresh_interval must be an integer of at least 1, not 0"),
        ({"scale": "sqrt"}, "scale must be 'paper' or 'code', not 'sqrt'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoext.LOZO(nn.Linear(8, 6), **options)
