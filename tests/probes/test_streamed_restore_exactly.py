"""After `estimate`, and after a closure that raises anywhere, the model is bit for bit what it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoext

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Block(nn.Module):
    """A parent with weights of its own around children that run while it runs, and a tied layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(11))
        self.special = nn.Parameter(torch.zeros(3))  # moved, but no forward depends on it
        self.first = nn.Linear(7, 11)
        self.norm = nn.BatchNorm1d(11)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(11, 7, bias=False)
        self.third = nn.Linear(7, 11)
        self.third.weight = self.first.weight
        self.frozen = nn.Linear(11, 5).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x))) * self.scale
        return self.frozen(self.third(self.second(x)).tanh())


def snapshot(model: nn.Module) -> dict[str, object]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    state: dict[str, object] = {}
    for name, tensor in tensors:
        state[name] = (tensor.detach().clone(), tensor.data_ptr(), id(tensor), tensor.requires_grad)
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called)
        state[f"hooks of {name}"] = [list(h.items()) for h in hooks]
        state[f"members of {name}"] = (list(module._parameters), list(module._buffers), module.training)
    return state


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple) and isinstance(value[0], Tensor):
            assert isinstance(after[name], tuple)
            old, new = value[0], after[name][0]  # type: ignore[index]
            integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
            assert torch.equal(old.view(integers), new.view(integers)), name
            assert value[1:] == after[name][1:], name  # type: ignore[index]
        else:
            assert value == after[name], name


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(Block(), nn.Identity()).to(dtype)
    model[1].register_forward_hook(lambda *_: None)
    model[0].first.register_forward_pre_hook(lambda *_: None)
    with torch.no_grad():
        model[0].special.copy_(torch.tensor([-0.0, float("nan"), torch.finfo(dtype).tiny / 2]))
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", [zoext.Gaussian(), zoext.Rademacher()])
def test_after_an_estimate(dtype: torch.dtype, training: bool, direction: zoext.Direction) -> None:
    model = model_of(dtype).train(training)
    x = torch.randn(9, 7, dtype=dtype)
    optimizer = zoext.ZerothOrderOptimizer(
        model, direction=direction, estimator=zoext.CentralDifference(samples=2), mu=0.3, probe="streamed"
    )
    before = snapshot(model)
    for _ in range(2):
        estimate = optimizer.estimate(lambda: model(x).float().square().mean())
    assert estimate.forwards == 4
    assert estimate.coefficients.abs().min() > 0
    after = snapshot(model)
    for name in ("0.norm.running_mean", "0.norm.running_var", "0.norm.num_batches_tracked"):
        old, new = before.pop(name), after.pop(name)
        assert torch.equal(old[0], new[0]) != training  # type: ignore[index]
        assert old[1:] == new[1:], name  # type: ignore[index]
    assert_same(before, after)


def test_with_a_module_that_came_later() -> None:
    """It writes to buffers that nobody has watched before; the third estimate is not a watched one."""
    model = nn.Sequential(nn.Linear(7, 11), nn.Identity())
    x = torch.randn(9, 7)
    optimizer = zoext.MeZO(model)
    for _ in range(2):
        optimizer.estimate(lambda: model(x).square().mean())
    model[1] = nn.BatchNorm1d(11, affine=False)
    optimizer.step(lambda: model(x).square().mean())
    assert model[1].num_batches_tracked == 1


class Stop(BaseException):
    """Like KeyboardInterrupt, not an Exception."""


@pytest.mark.parametrize("error", [ValueError, Stop, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", DTYPES)
def test_after_a_closure_that_raises_at_any_forward(dtype: torch.dtype, error: type[BaseException]) -> None:
    model = model_of(dtype).train()
    x = torch.randn(9, 7, dtype=dtype)
    optimizer = zoext.MeZO(model, mu=0.3, samples=2)
    before = snapshot(model)
    modules = [module for module in model.modules() if not isinstance(module, nn.Identity)]
    for forward in range(4):
        for place, module in enumerate(modules):
            calls = 0

            def fail(*_: object, stop_at: int = forward) -> None:
                nonlocal calls
                calls += 1
                if calls > stop_at:
                    raise error("here")

            handle = (
                module.register_forward_hook(fail) if place % 2 else module.register_forward_pre_hook(fail)
            )
            with pytest.raises(error, match="here"):
                optimizer.estimate(lambda: model(x).float().mean())
            handle.remove()
            assert_same(before, snapshot(model))
    optimizer.estimate(lambda: model(x).float().mean())  # and the optimizer still works


def test_a_module_that_catches_what_its_child_raises_goes_on_with_displaced_weights() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"{self.weight.sum()}")

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = Fails()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.child(x)
            except ValueError:
                return (x * self.weight).sum()

    model = Catches()
    before = snapshot(model)
    estimate = zoext.MeZO(model, mu=0.5, seed=4).estimate(lambda: model(torch.arange(5.0)))
    seed = zoext.noise.step_seed(4, 0)
    z = zoext.noise.normal(5, seed=seed, key=0)
    assert estimate.coefficients.item() == pytest.approx((z * torch.arange(5.0)).sum().item(), rel=1e-5)
    assert_same(before, snapshot(model))


def test_what_a_module_returns_of_its_weights_stays_displaced() -> None:
    class Holder(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(size))

        def forward(self) -> dict[str, tuple[Tensor, Tensor]]:
            return {"views": (self.weight[1:], self.weight)}

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Holder(6), Holder(6)

        def forward(self) -> Tensor:
            (first, _), (second, _) = self.a()["views"], self.b()["views"]
            return (first - second).sum()

    model = Adds()
    estimate = zoext.MeZO(model, mu=0.5, seed=9).estimate(model)
    seed = zoext.noise.step_seed(9, 0)
    a, b = (zoext.noise.normal(6, seed=seed, key=key)[1:] for key in (0, 1))
    assert estimate.coefficients.item() == pytest.approx((a - b).sum().item(), rel=1e-5)


def test_buffers_that_cannot_be_copied_are_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("complex", torch.ones(3, dtype=torch.complex64))
            self.register_buffer("elsewhere", torch.ones(3, device="meta"))
            self.register_buffer("scalar", torch.tensor(float("nan")))
            self.register_buffer("absent", None)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self) -> Tensor:
            self.count += 1
            return (torch.mv(self.sparse, self.weight) * self.complex.real).sum()

    model = Odd()
    optimizer = zoext.MeZO(model, probe="streamed")
    assert optimizer.step(model).isfinite()
    assert model.count == 1
    assert optimizer.step(model).isfinite()
    assert model.count == 2
