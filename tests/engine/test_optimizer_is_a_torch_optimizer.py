"""Groups, schedulers, hooks, two-phase steps: what code written for torch.optim relies on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import zoext


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def loss_of(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize(
    "params",
    [
        lambda model: model,
        lambda model: model.parameters(),
        lambda model: model.named_parameters(),
        lambda model: [{"params": model.parameters()}],
        lambda model: [{"params": model[0].parameters()}, {"params": tuple(model[2].parameters())}],
        lambda model: [{"params": model.named_parameters()}],
        lambda model: [{"params": next(iter(model.parameters()))}, {"params": list(model.parameters())[1:]}],
    ],
)
def test_params_may_be_whatever_torch_takes(params: object) -> None:
    model, reference = model_of(), model_of()
    optimizer = zoext.MeZO(params(model), lr=0.1, mu=0.1, seed=5)  # type: ignore[operator]
    same = zoext.MeZO(reference, lr=0.1, mu=0.1, seed=5, probe="inplace")
    for _ in range(2):
        optimizer.step(lambda: loss_of(model))
        same.step(lambda: loss_of(reference))
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_default_probe() -> None:
    model = model_of()
    assert isinstance(zoext.MeZO(model).engine.probe, zoext.StreamedProbe)
    assert isinstance(zoext.MeZO(model.parameters()).engine.probe, zoext.InplaceProbe)
    own = zoext.StreamedProbe(model)
    assert zoext.MeZO(model.parameters(), probe=own).engine.probe is own


def test_groups_have_their_own_lr_and_weight_decay() -> None:
    model = model_of()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": [model[2].weight], "weight_decay": 0.5},
        {"params": [model[2].bias]},
    ]
    optimizer = zoext.MeZO(groups, lr=0.1, mu=0.01, probe=zoext.StreamedProbe(model))
    optimizer.step(lambda: loss_of(model))
    slope = optimizer.last_estimate.coefficients
    z = [
        zoext.noise.normal(parameter.shape, seed=zoext.noise.step_seed(0, 0), key=key)
        for key, parameter in enumerate(model.parameters())
    ]
    now = list(model.parameters())
    assert torch.equal(now[0], before[0])
    assert torch.equal(now[1], before[1])
    assert torch.allclose(now[2], before[2] - 0.1 * (slope * z[2] + 0.5 * before[2]), atol=1e-6)
    assert torch.allclose(now[3], before[3] - 0.1 * slope * z[3], atol=1e-6)


def test_schedulers_set_the_lr_of_the_step() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, lr=0.5, mu=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    for step in range(3):
        before = model[2].bias.detach().clone()
        optimizer.step(lambda: loss_of(model))
        z = zoext.noise.normal(2, seed=zoext.noise.step_seed(0, step), key=3)
        moved = optimizer.last_estimate.coefficients * -(0.5 * 0.1**step) * z
        assert torch.allclose(model[2].bias, before + moved, rtol=1e-4, atol=1e-7)
        scheduler.step()


def test_lr_may_be_a_tensor() -> None:
    models = [model_of(), model_of()]
    for model, lr in zip(models, (0.25, torch.tensor(0.25)), strict=True):
        optimizer = zoext.MeZO(model, lr=lr, weight_decay=0.5, mu=0.1)
        optimizer.step(lambda model=model: loss_of(model))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_added_groups_take_the_next_keys() -> None:
    model = model_of()
    optimizer = zoext.MeZO([{"params": list(model[0].parameters())}], lr=0.1, mu=0.1)
    optimizer.step(lambda: loss_of(model))
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.3})
    before = model[2].weight.detach().clone()
    optimizer.step(lambda: loss_of(model))
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    z = zoext.noise.normal((2, 6), seed=zoext.noise.step_seed(0, 1), key=2)
    step = optimizer.last_estimate.coefficients * -0.3
    assert torch.allclose(model[2].weight, before + step * z, atol=1e-6)


def test_step_and_estimate_are_two_phases() -> None:
    once, twice = model_of(), model_of()
    a, b = zoext.MeZO(once, lr=0.1, mu=0.1), zoext.MeZO(twice, lr=0.1, mu=0.1)
    for _ in range(2):
        returned = a.step(lambda: loss_of(once))
        estimate = b.estimate(lambda: loss_of(twice))
        assert torch.equal(b.step(), estimate.loss)
        assert torch.equal(returned, estimate.loss)
        assert returned.dtype == torch.float32
        assert returned.shape == ()
        assert not returned.requires_grad
    assert all(torch.equal(p, q) for p, q in zip(once.parameters(), twice.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"call estimate\(closure\) first"):
        b.step()


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = model_of(), model_of()
    a, b = zoext.MeZO(whole, lr=0.1, mu=0.1, samples=2), zoext.MeZO(parts, lr=0.1, mu=0.1, samples=2)
    a.step(lambda: loss_of(whole))
    for row in X.split(1):
        b.estimate(lambda row=row: loss_of(parts, row))
    b.step()
    assert b.last_estimate.seeds.numel() == 2
    assert b.last_estimate.forwards == 12
    assert torch.allclose(a.last_estimate.coefficients, b.last_estimate.coefficients, rtol=1e-4)
    assert torch.allclose(a.last_estimate.loss, b.last_estimate.loss)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)


def test_hooks_and_zero_grad() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model)
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    optimizer.register_step_post_hook(lambda *_: order.append("after"))
    optimizer.zero_grad()
    optimizer.step(lambda: order.append("closure") or loss_of(model))
    optimizer.zero_grad(set_to_none=False)
    assert order == ["before", "closure", "closure", "after"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_closures_run_without_gradients_and_may_return_floats() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, mu=0.1)

    def closure() -> float:
        assert not torch.is_grad_enabled()
        return loss_of(model).item()

    as_float = optimizer.estimate(closure)
    as_tensor = zoext.MeZO(model, mu=0.1).estimate(lambda: loss_of(model).reshape(1))
    assert torch.allclose(as_float.coefficients, as_tensor.coefficients, rtol=1e-4)
    assert as_float.coefficients.dtype == torch.float32


def test_differences_of_float64_losses_keep_their_digits() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = zoext.MeZO([weight], mu=1e-6)
    estimate = optimizer.estimate(lambda: 1000 + weight.sum())
    z = zoext.noise.normal(3, seed=zoext.noise.step_seed(0, 0)).double()
    assert estimate.coefficients.item() == pytest.approx(z.sum().item(), rel=1e-5)


def test_numbers_of_numpy_are_as_good_as_floats() -> None:
    for number in (np.float32(0.5), np.float64(0.5), 1):
        assert zoext.MeZO(model_of(), probe="inplace").step(lambda number=number: number) == float(number)


def test_a_step_with_a_closure_starts_afresh() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, mu=0.1)
    optimizer.estimate(lambda: loss_of(model))  # only to look at
    optimizer.step(lambda: loss_of(model))
    assert optimizer.last_estimate.forwards == 2
    optimizer.estimate(lambda: loss_of(model))
    with pytest.raises(FloatingPointError):
        optimizer.estimate(lambda: float("nan"))
    with pytest.raises(RuntimeError, match="nothing to apply"):
        optimizer.step()


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_deepcopy_with_the_model_continues_alike(probe: str) -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, lr=0.1, mu=0.1, probe=probe)
    optimizer.step(lambda: loss_of(model))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for _ in range(2):
        optimizer.step(lambda: loss_of(model))
        twin_optimizer.step(lambda: loss_of(twin))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("outer", [False, True])
def test_inference_mode(probe: str, outer: bool) -> None:
    """In the closure, as code that computes a score does, or around the step."""
    model, reference = model_of(), model_of()
    optimizer, plain = (zoext.MeZO(m, lr=0.1, mu=0.1, probe=probe) for m in (model, reference))

    def closure() -> torch.Tensor:
        with torch.inference_mode():
            return loss_of(model)

    for _ in range(2):
        with torch.inference_mode(outer):
            optimizer.step(closure)
        plain.step(lambda: loss_of(reference))
    optimizer.step(closure)
    plain.step(lambda: loss_of(reference))
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_autocast_around_the_step_sees_every_displacement(probe: str) -> None:
    """Autocast keeps casts of the weights that it has seen."""
    model = model_of()
    x = torch.randn(3, 4)
    losses = []

    def closure() -> torch.Tensor:
        losses.append(model(x).float().square().mean())
        return losses[-1]

    optimizer = zoext.MeZO(model, lr=0.0, mu=0.3, probe=probe)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = closure()
        optimizer.step(closure)
        after = closure()
    _, plus, minus, _ = losses
    assert (plus - minus).abs() > 1e-2
    assert before == pytest.approx(after.item(), rel=1e-6 if probe == "streamed" else 1e-2)


def test_version_counters_move() -> None:
    """Autograd must refuse to use what a step has changed."""
    model = model_of()
    loss = loss_of(model)
    zoext.MeZO(model).step(lambda: loss_of(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_mode_is_left_alone() -> None:
    model = model_of().train()
    model[0].eval()
    zoext.MeZO(model).step(lambda: loss_of(model))
    assert [module.training for module in model.modules()] == [True, False, True, True]


def test_it_learns() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, lr=0.02, mu=1e-3)
    first = loss_of(model).item()
    for _ in range(300):
        optimizer.step(lambda: loss_of(model))
    assert loss_of(model).item() < 0.1 * first
