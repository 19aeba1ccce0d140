"""Weights of any strides get the bits that contiguous ones get: an element's noise is that of its index."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoext
from zoext.directions import _parts

RECIPES: dict[str, Callable[..., zoext.ZerothOrderOptimizer]] = {
    "MeZO": zoext.MeZO,
    "AdaMeZO": lambda model, **options: zoext.AdaMeZO(model, horizon=2, **options),
    "LOZO": lambda model, **options: zoext.LOZO(model, refresh_interval=2, **options),
    "AGZO": zoext.AGZO,
}
IMAGES = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(6).reshape(2, 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 4, 3), nn.Embedding(80, 4)
        self.linear, self.inner = nn.Linear(4, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.conv(images.to(self.scale.dtype)).mean((2, 3)) + self.table(tokens).mean(1)
        return self.inner(torch.tanh(self.linear(hidden))) * self.scale


def contiguous(dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def strided(dtype: torch.dtype) -> Model:
    """The same weights: channels_last, transposed, a part of the columns of another tensor, every second."""
    model = contiguous(dtype)
    model.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in (model.linear, model.table):
        module.weight.data = module.weight.data.t().contiguous().t()
    columns = torch.zeros(6, 9, dtype=dtype)
    columns[:, 2:8] = model.inner.weight.data
    model.inner.weight.data = columns[:, 2:8]
    model.scale.data = torch.stack((model.scale.data, model.scale.data), 1)[:, 0]
    changed = [name for name, weight in model.named_parameters() if not weight.is_contiguous()]
    assert changed == ["scale", "conv.weight", "table.weight", "linear.weight", "inner.weight"]
    return model


def given_losses(model: Model) -> Callable[[], Tensor]:
    """Runs the model, whose losses may differ by rounding, and returns losses that do not depend on it."""
    losses = iter([1.0, 1.25, 0.75, 1.5, 1.0, 2.0, 1.0, 0.5, 0.25])

    def closure() -> Tensor:
        assert model(IMAGES, TOKENS).isfinite().all()
        return torch.tensor(next(losses))

    return closure


def trained(model: Model, recipe: str, **options: object) -> dict[str, Tensor]:
    optimizer = RECIPES[recipe](model, lr=1e-2, mu=1e-2, weight_decay=0.1, seed=3, **options)
    closure = given_losses(model)
    for _ in range(3):
        optimizer.step(closure)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "stochastic"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "residual")],
)
@pytest.mark.parametrize("recipe", ["MeZO", "AdaMeZO", "LOZO"])
def test_bits_are_those_of_contiguous_weights(
    recipe: str, dtype: torch.dtype, precision: str, probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_parts, "PIECE", 7)  # elements that are copied at a time, so that there are several
    options = {"precision": precision, "probe": probe}
    expected = trained(contiguous(dtype), recipe, **options)
    found = trained(strided(dtype), recipe, **options)
    began = dict(contiguous(dtype).named_parameters())
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
        assert not torch.equal(weight, began[name]), name


class Multiplied(nn.Module):
    """Weights that AGZO sees in products of the input itself, whose rounding does not depend on them.

    Args:
        order: of the dimensions in memory, slowest first.
    """

    def __init__(self, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.square, self.wide = nn.Linear(4, 4, bias=False), nn.Linear(4, 6, bias=False)
        self.right, self.left = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4, 6))
        for weight in self.parameters():
            own = [dim for dim in order if dim < weight.dim()]
            back = [own.index(dim) for dim in range(weight.dim())]
            weight.data = weight.data.permute(own).contiguous().permute(back)

    def forward(self, x: Tensor) -> Tensor:
        matrices = F.linear(x, self.square.weight).sum() + (x @ self.wide.weight.t()).sum()
        stack = F.linear(x, self.right[0]) + x @ self.right.mT[2] + F.linear(x, self.right.clone()[0])
        routes = torch.tensor([0, 2, 2, 0, 1])
        gathered = torch.bmm(x[:, None], self.left[routes]).sum() + (x[:2] @ self.left[1, :, 1:4]).sum()
        return matrices + stack.sum() + gathered


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 2, 0), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_agzo_tells_the_sides_of_products(order: tuple[int, ...], probe: str) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    ends = []
    for given in ((0, 1, 2), order):
        model = Multiplied(given)
        optimizer = zoext.AGZO(model, lr=1e-2, mu=1e-2, seed=3, probe=probe)
        losses = iter([1.0, 1.25, 0.75, 1.5, 1.0, 2.0, 1.0, 0.5, 0.25])
        for _ in range(2):
            optimizer.step(lambda model=model, losses=losses: model(x) * 0 + next(losses))
        ends.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    began = dict(Multiplied().named_parameters())
    for name, weight in ends[0].items():
        assert torch.equal(ends[1][name], weight), name
        change = (weight - began[name]).reshape(-1, *weight.shape[-2:])
        assert all(torch.linalg.matrix_rank(each, rtol=1e-3) < 3 for each in change), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_streamed_probes_restore_them(recipe: str) -> None:
    model = strided(torch.float32)
    before = {name: (weight.detach().clone(), weight.stride()) for name, weight in model.named_parameters()}
    optimizer = RECIPES[recipe](model, mu=1e-2)
    for _ in range(3):
        optimizer.estimate(lambda: model(IMAGES, TOKENS).square().mean())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0]), name
        assert weight.stride() == before[name][1], name
    assert "elsewhere" not in optimizer.probe.describe()


@pytest.mark.parametrize("recipe", RECIPES)
def test_slopes_are_those_of_contiguous_weights(recipe: str) -> None:
    slopes = []
    for model in (contiguous(torch.float64), strided(torch.float64)):
        optimizer = RECIPES[recipe](model, mu=1e-3, seed=3)
        estimate = optimizer.estimate(lambda model=model: model(IMAGES, TOKENS).square().mean())
        slopes.append(float(estimate.coefficients))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4 if recipe == "AGZO" else 1e-7)


def test_a_displaced_weight_has_the_strides_of_the_weight() -> None:
    model = strided(torch.float32)
    seen = []
    model.conv.register_forward_hook(lambda module, *_: seen.append(module.weight.stride()))
    zoext.MeZO(model).step(lambda: model(IMAGES, TOKENS).square().mean())
    assert set(seen) == {model.conv.weight.stride()}
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_rows_of_two_weights_that_lie_between_each_other() -> None:
    """Neither is an alias of the other."""
    torch.manual_seed(0)
    both = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight = nn.Parameter(both[:, :4])
    model[1].weight = nn.Parameter(both[:, 4:], requires_grad=False)
    optimizer = zoext.MeZO(model, mu=1e-2)
    for _ in range(4):
        optimizer.step(lambda: model(torch.ones(2, 4)).square().mean())
    assert "elsewhere" not in optimizer.probe.describe()


def test_they_are_recorded_and_replayed(tmp_path: Path) -> None:
    model = strided(torch.bfloat16)
    base = copy.deepcopy(model)
    optimizer = zoext.MeZO(model, lr=1e-2, mu=1e-2)
    with zoext.Trajectory(tmp_path / "run.jsonl", optimizer):
        for _ in range(3):
            optimizer.step(lambda: model(IMAGES, TOKENS).float().square().mean())
    for again in (base, contiguous(torch.bfloat16)):
        zoext.replay(again, tmp_path / "run.jsonl")
        for weight, expected in zip(again.parameters(), model.parameters(), strict=True):
            assert torch.equal(weight, expected)


def test_transposed_buffers() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("seen", torch.zeros(2, 3).t())
            self.register_buffer("fixed", torch.ones(3, 1).expand(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(x * self.fixed[:, 0])

    model = Counting()
    optimizer = zoext.MeZO(model, mu=1e-2)
    for _ in range(3):
        optimizer.step(lambda: model(torch.ones(4, 3)).square().mean())
    assert torch.equal(model.seen, torch.full((3, 2), 3.0))
    assert model.seen.stride() == (1, 3)
    assert torch.equal(model.fixed, torch.ones(3, 2))
