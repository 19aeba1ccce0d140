"""Running statistics move as by one forward for each estimate: that at theta, or else the first one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import zoext

PROBES = ("streamed", "inplace")
X = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)) * 3 + 2


class Model(nn.Module):
    """A norm that runs twice, one that runs once, and buffers that are replaced or grow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 2)
        self.twice, self.once = nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
            self.seen = torch.cat((self.seen, x[:1, 0]))
        return self.outer(self.once(torch.tanh(self.twice(self.inner(self.twice(x))))))


def loss_of(model: nn.Module, x: Tensor = X) -> Callable[[], Tensor]:
    return lambda: model(x).square().mean()


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name != "seen"}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("probe", PROBES)
def test_with_a_centre_they_are_those_of_a_forward_at_theta(probe: str) -> None:
    model = Model()
    optimizer = zoext.ZerothOrderOptimizer(
        model, estimator=zoext.ForwardDifference(samples=2), lr=1e-2, mu=0.1, probe=probe
    )
    for _ in range(5):  # watched, and not
        expected = copy.deepcopy(model)
        with torch.no_grad():
            loss_of(expected)()
        optimizer.step(loss_of(model))
        assert_equal(buffers(model), buffers(expected))
    assert model.calls == 5
    assert model.twice.num_batches_tracked == 10
    assert model.seen.numel() == 15  # of another shape than the buffer that it replaces: it stays


@pytest.mark.parametrize("probe", PROBES)
def test_without_a_centre_they_are_those_of_the_first_probe(probe: str) -> None:
    class Enough(Exception):
        pass

    model = Model()
    optimizer = zoext.MeZO(model, lr=1e-2, mu=0.1, seed=3, probe=probe)
    for step in range(5):
        expected = copy.deepcopy(model)
        other = zoext.MeZO(expected.named_parameters(), mu=0.1, seed=3, probe="inplace")
        other.param_groups[0]["step"] = step

        def only_once(expected: nn.Module = expected) -> Tensor:
            loss_of(expected)()
            raise Enough

        with pytest.raises(Enough):
            other.step(only_once)
        optimizer.step(loss_of(model))
        found, wanted = buffers(model), buffers(expected)
        for name in found:
            assert torch.allclose(found[name], wanted[name], rtol=1e-5), name


RECIPES: dict[str, Callable[..., zoext.ZerothOrderOptimizer]] = {
    "mezo": zoext.MeZO,
    "several samples": partial(zoext.MeZO, samples=3),
    "agzo": zoext.AGZO,
    "lozo": zoext.LOZO,
    "gv": zoext.MeZOGV,
    "greedy": zoext.MeZOGreedy,
    "adamezo": zoext.AdaMeZO,
}


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_counts_one_batch_a_step(recipe: str, probe: str) -> None:
    model = Model()
    optimizer = RECIPES[recipe](model, probe=probe)
    for _ in range(5):
        optimizer.step(loss_of(model))
    assert (model.calls, model.once.num_batches_tracked, model.twice.num_batches_tracked) == (5, 5, 10)


@pytest.mark.parametrize("probe", PROBES)
def test_every_micro_batch_counts_and_ask_counts_one(probe: str) -> None:
    model = Model()
    optimizer = zoext.MeZO(model, probe=probe)
    optimizer.estimate(loss_of(model))
    optimizer.estimate(loss_of(model, X[:9]))
    optimizer.step()
    assert model.once.num_batches_tracked == 2
    pending = optimizer.ask()
    while pending is not None:
        losses = []
        for index in range(len(pending)):
            with pending.displaced(index):
                losses.append(loss_of(model)())
        pending = optimizer.tell(losses)
    optimizer.step()
    assert model.once.num_batches_tracked == 3


@pytest.mark.parametrize("probe", PROBES)
def test_nothing_changes_in_evaluation_or_if_a_later_forward_raises(probe: str) -> None:
    model = Model()
    optimizer = zoext.MeZO(model, probe=probe)
    before = buffers(model)
    for fails_at in (1, 2, 1, 2):
        calls = 0

        def closure(fails_at: int = fails_at) -> Tensor:
            nonlocal calls
            calls += 1
            loss = loss_of(model)()
            if calls == fails_at:
                raise ValueError("no more")
            return loss

        with pytest.raises(ValueError, match="no more"):
            optimizer.step(closure)
        assert_equal(before, buffers(model))
    model.eval()
    for _ in range(3):
        optimizer.step(loss_of(model))
    assert_equal(before, buffers(model))


@pytest.mark.parametrize("probe", PROBES)
def test_a_batch_that_is_not_finite_leaves_statistics_finite(probe: str) -> None:
    model = Model()
    optimizer = zoext.MeZO(model, probe=probe, nonfinite="skip")
    broken = X.clone()
    broken[3, 2] = torch.nan
    for x in (X, broken, X):
        optimizer.step(loss_of(model, x))
    assert optimizer.nonfinite_steps == 1
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_evaluation_works_after_training() -> None:
    """A norm whose statistics never moved leaves a model that is right in training mode alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 10, generator=generator) * 3 + 5
    labels = (x[:, 0] > 5).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = zoext.MeZO(model, lr=2e-2, mu=1e-3)
    for _ in range(300):
        optimizer.step(lambda: nn.functional.cross_entropy(model(x), labels))
    with torch.no_grad():
        in_training = float((model(x).argmax(1) == labels).float().mean())
        in_evaluation = float((model.eval()(x).argmax(1) == labels).float().mean())
    assert in_training > 0.7
    assert abs(in_training - in_evaluation) < 0.05


class Rotary(nn.Module):
    """Replaces its buffer by a longer one when it must, and remembers the length itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.cached = nn.Linear(5, 5), 2
        self.register_buffer("cos", torch.ones(2, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.cached:
            self.cached = len(x)
            self.register_buffer("cos", torch.full((len(x), 5), 0.5), persistent=False)
        return self.layer(x) * self.cos[: len(x)]


@pytest.mark.parametrize("probe", PROBES)
def test_iterations_of_buffers_do_not_differ_between_probes(probe: str) -> None:
    """Spectral normalization iterates on its buffers: all forwards of a step begin with the same ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    nn.utils.parametrizations.spectral_norm(model[0])
    other = copy.deepcopy(model)
    optimizer, expected = (zoext.MeZO(each, lr=1e-2, mu=1e-2, probe=probe, seed=3) for each in (model, other))
    for _ in range(5):
        begins = buffers(model)
        assert begins

        def from_the_same(begins: dict[str, Tensor] = begins) -> Tensor:
            for name, buffer in other.named_buffers():
                buffer.copy_(begins[name])
            return loss_of(other)()

        optimizer.step(loss_of(model))
        expected.step(from_the_same)
        assert not any(torch.equal(buffer, begins[name]) for name, buffer in model.named_buffers())
        for one, its in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, its)


@pytest.mark.parametrize("grows_at", [0, 2, 4])
def test_a_cache_that_grows_stays_as_its_module_knows_it(grows_at: int) -> None:
    model, other = Rotary(), Rotary()
    optimizer = zoext.MeZO(model, lr=1e-2, mu=1e-2, seed=3, probe="streamed")
    expected = zoext.MeZO(other, lr=1e-2, mu=1e-2, seed=3, probe="inplace")
    for step in range(6):
        x = X if step >= grows_at else X[:2]
        found, wanted = (float(one.step(loss_of(m, x))) for one, m in ((optimizer, model), (expected, other)))
        assert found == pytest.approx(wanted, rel=1e-5)
    assert model.cos.shape == X.shape


@pytest.mark.parametrize("probe", PROBES)
def test_ask_and_tell_write_them_when_the_estimate_is_complete(probe: str) -> None:
    """However often the probe at theta is evaluated, and not at all for a round that is cancelled."""
    for ends in ("told", "cancelled", "not finite"):
        model = Model()
        optimizer = zoext.ZerothOrderOptimizer(
            model, estimator=zoext.ForwardDifference(samples=1), probe=probe, nonfinite="skip"
        )
        before, expected = buffers(model), copy.deepcopy(model)
        with torch.no_grad():
            loss_of(expected)()
        asked = optimizer.ask()
        for index in (0, 0, 1):
            with asked.displaced(index):
                loss_of(model)()
        assert_equal(buffers(model), before)
        if ends == "cancelled":
            optimizer.cancel()
        else:
            optimizer.tell([0.5, float("nan") if ends == "not finite" else 0.6])
        assert_equal(buffers(model), buffers(expected) if ends == "told" else before)


@pytest.mark.parametrize("probe", PROBES)
def test_a_buffer_that_was_kept_may_grow_in_a_later_probe(probe: str) -> None:
    model = Model()
    optimizer = zoext.MeZO(model, probe=probe)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = loss_of(model)()
        if calls % 2 == 0:
            model.calls = torch.full((2,), calls)
        return loss

    for _ in range(4):
        optimizer.step(closure)
        assert model.calls.shape == (2,)
