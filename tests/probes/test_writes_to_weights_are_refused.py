"""A closure that writes to weights is refused before it has written, so that no bit of the model changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoext

PROBES = ("streamed", "inplace")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


class LoRA(nn.Module):
    """A linear layer with an adapter that is merged and unmerged as PEFT does it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.merged = False

    def delta(self) -> Tensor:
        return self.up.weight @ self.down.weight

    def merge(self) -> None:
        self.base.weight.data += self.delta()
        self.merged = True

    def merge_safely(self) -> None:
        merged = self.base.weight.data.clone()
        merged += self.delta()
        self.base.weight.data = merged
        self.merged = True

    def merge_packed(self) -> None:
        """As with bitsandbytes, whose weights are packed anew."""
        merged = self.base.weight + self.delta()
        self.base.weight = nn.Parameter(merged, requires_grad=False)
        self.merged = True

    def unmerge(self) -> None:
        self.base.weight.data -= self.delta()
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + self.up(self.down(x))


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LoRA(nn.Linear(4, 4)), nn.Tanh(), LoRA(nn.Linear(4, 4))).bfloat16()


def loss_of(model: nn.Module) -> Tensor:
    return model(X.bfloat16()).float().square().mean()


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("recipe", [zoext.MeZO, zoext.AGZO])
@pytest.mark.parametrize("merge", ["merge", "merge_safely", "merge_packed"])
@pytest.mark.parametrize("probe", PROBES)
def test_adapters_merged_in_the_closure(
    probe: str, merge: str, recipe: Callable[..., zoext.ZerothOrderOptimizer]
) -> None:
    model = model_of()
    before = bits_of(model)

    def closure() -> Tensor:
        for layer in (model[0], model[2]):
            getattr(layer, merge)()
        loss = loss_of(model)
        for layer in (model[0], model[2]):
            layer.unmerge()
        return loss

    optimizer = recipe(model, lr=1e-2, mu=1e-2, probe=probe)
    with pytest.raises(RuntimeError, match=r"0\.base\.weight.*unmerged"):
        optimizer.step(closure)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    for name, weight in bits_of(model).items():
        if probe == "streamed" or name in frozen:
            assert torch.equal(weight, before[name]), name
    for layer in (model[0], model[2]):
        layer.merged = False
    optimizer.step(lambda: loss_of(model))  # as it is right


@pytest.mark.parametrize("probe", PROBES)
def test_weights_that_follow_others(probe: str) -> None:
    """The key encoder of MoCo, and weights that are clipped."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    before = bits_of(model)

    def follow() -> Tensor:
        with torch.no_grad():
            for own, other in zip(model[1].parameters(), model[0].parameters(), strict=True):
                own.mul_(0.9).add_(other, alpha=0.1)
        return loss_of(model.bfloat16())

    with pytest.raises(RuntimeError, match=r"closure writes to 1\.weight"):
        zoext.MeZO(model, probe=probe).step(follow)
    assert torch.equal(model[1].weight, before["1.weight"])


@pytest.mark.parametrize("probe", PROBES)
def test_wrappers_that_write_to_what_they_wrap(probe: str) -> None:
    """As PEFT's adapters of expert weights do, which parametrize a weight during their forward."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4).requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.base.weight.data.mul_(1.0)
            return self.base(x) * self.scale

    model = nn.Sequential(Wrapper(), nn.Linear(4, 2)).bfloat16()
    optimizer = zoext.MeZO(model, lr=1.0, probe=probe)
    before = bits_of(model)
    optimizer.step(lambda: loss_of(model))
    after = bits_of(model)
    assert torch.equal(after["0.base.weight"], before["0.base.weight"])
    assert not torch.equal(after["1.weight"], before["1.weight"])


@pytest.mark.parametrize("build", [zoext.MeZO, zoext.MeZOGreedy])
@pytest.mark.parametrize("probe", PROBES)
def test_layers_that_write_to_their_own(probe: str, build: Callable[..., zoext.ZerothOrderOptimizer]) -> None:
    """Layers that set themselves up in their first forward, parametrizations, running statistics."""

    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.shift = nn.Parameter(torch.zeros(4), requires_grad=False)
            self.is_set_up = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.is_set_up:
                self.shift.data.copy_(x.mean(0))
                self.is_set_up = True
            return super().forward(x - self.shift)

    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    weight = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(Scaled(), spectral, nn.BatchNorm1d(4), weight, nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    optimizer = build(model, lr=1e-3, mu=1e-3, probe=probe)
    for _ in range(3):
        optimizer.step(lambda: model(X).square().mean())
    assert model[0].shift.abs().sum() > 0
    assert model[2].running_mean.abs().sum() > 0


class SetsItselfUp(nn.Linear):
    """Its bias, which trains, comes from the first batch, as in ActNorm."""

    is_set_up = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_set_up:
            self.bias.data.copy_(-x.mean())
            self.is_set_up = True
        return super().forward(x)


@pytest.mark.parametrize("build", [zoext.MeZO, zoext.MeZOGreedy, zoext.LOZO, zoext.AGZO])
@pytest.mark.parametrize("probe", PROBES)
def test_layers_that_write_to_weights_that_train(
    probe: str, build: Callable[..., zoext.ZerothOrderOptimizer]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), SetsItselfUp(4, 4), nn.Tanh(), nn.Linear(4, 2))
    before, other = bits_of(model), copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"writes to 1\.bias in a forward, while it is"):
        build(model, lr=1e-3, mu=1e-3, probe=probe).step(lambda: model(X).square().mean())
    if probe == "streamed":
        assert all(torch.equal(bits, before[name]) for name, bits in bits_of(model).items())
    with torch.no_grad():
        other(X)
    set_up = other[1].bias.detach().clone()
    optimizer = build(other, lr=1e-3, mu=1e-3, probe=probe)
    optimizer.estimate(lambda: other(X).square().mean())
    assert torch.allclose(other[1].bias, set_up)


class Rescaled(nn.Module):
    """Divides weights of its layers once, as RWKV does for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.is_rescaled = nn.Linear(4, 4), nn.Linear(4, 2), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_rescaled:
            with torch.no_grad():
                self.last.weight.div_(2)
            self.is_rescaled = True
        return self.last(self.first(x)) * 2


@pytest.mark.parametrize("build", [zoext.MeZO, zoext.MeZOGreedy, zoext.AGZO])
@pytest.mark.parametrize("probe", PROBES)
def test_models_that_write_to_weights_of_their_layers(
    probe: str, build: Callable[..., zoext.ZerothOrderOptimizer]
) -> None:
    torch.manual_seed(0)
    model = Rescaled()
    before = model.last.weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"writes to last\.weight in a forward, while it is displaced.*once"
    ):
        build(model, probe=probe).step(lambda: model(X).square().mean())
    assert torch.allclose(model.last.weight, before, rtol=0, atol=1e-6)
    model.is_rescaled = False
    with torch.no_grad():
        model(X)
    build(model, probe=probe).step(lambda: model(X).square().mean())
    assert torch.allclose(model.last.weight, before / 2, rtol=1e-3)


def test_embeddings_that_limit_their_norms() -> None:
    """A streamed probe limits those of the displaced rows; one in place would leave theta elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Linear(4, 2))
    tokens, before = torch.tensor([[0, 1, 2]]), bits_of(model)

    def closure() -> Tensor:
        return model(tokens).square().mean()

    def limited() -> Tensor:
        rows = model[0].weight[tokens]
        limited = rows * (0.5 / rows.norm(dim=-1, keepdim=True)).clamp(max=1)
        return model[1](limited).square().mean()

    optimizer, other = (zoext.MeZO(model, lr=0.0, mu=1e-2, probe="streamed", seed=3) for _ in range(2))
    for _ in range(5):  # in watched steps, and in others
        expected = float(other.estimate(limited).coefficients)
        assert float(optimizer.estimate(closure).coefficients) == pytest.approx(expected, rel=1e-3)
        optimizer.step()
        other.step()
        assert all(torch.equal(bits, before[name]) for name, bits in bits_of(model).items())
    with pytest.raises(RuntimeError, match=r"0\.weight.* set max_norm=None"):
        zoext.MeZO(model, probe="inplace").step(closure)


def test_weights_with_two_owners() -> None:
    """Either may run."""

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.bias.data.add_(1.0)
            return super().forward(x)

    model = nn.Sequential(Counting(4, 4), Counting(4, 4), nn.Linear(4, 2))
    model[1].bias = model[0].bias
    model[0].requires_grad_(False)
    for probe in PROBES:
        before = model[2].weight.detach().clone()
        zoext.MeZO(model, lr=1e-2, probe=probe).step(lambda: model(X).square().mean())
        assert not torch.equal(model[2].weight, before)


def test_without_a_module_nothing_is_watched() -> None:
    model = nn.Linear(4, 2)
    optimizer = zoext.MeZO(list(model.parameters()))
    assert isinstance(optimizer.probe, zoext.InplaceProbe)
    optimizer.step(lambda: model(X).square().mean())


@pytest.mark.parametrize("probe", PROBES)
def test_layers_that_replace_their_own_and_run_again(probe: str) -> None:
    """As packed layers do in their first forward."""

    class Repacking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data.clone()
            self.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
            return super().forward(x)

    model = nn.Sequential(Repacking(4, 4).requires_grad_(False), nn.Linear(4, 4))
    optimizer = zoext.MeZO(model, probe=probe)
    for _ in range(2):
        optimizer.step(lambda: model(model(X)).square().mean())
