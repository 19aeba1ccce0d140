"""Loops, scalers and checkpoints that are written for gradients work, or are told what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import zoext

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    dtype = next(model.parameters()).dtype
    return lambda: model(X.to(dtype)).float().square().mean()


def bits(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


RECIPES = {
    "mezo": lambda model: zoext.MeZO(model, lr=1e-2, seed=3),
    "adamezo": lambda model: zoext.AdaMeZO(model, lr=1e-2, horizon=3, seed=3),
    "residual": lambda model: zoext.MeZO(model, lr=1e-2, seed=3, precision="residual"),
    "tensor lr": lambda model: zoext.MeZO(model, lr=torch.tensor(1e-2), seed=3),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_distributed_checkpoints_continue_to_the_same_bits(recipe: str) -> None:
    """torch calls ``step()`` with zero gradients and lr on an optimizer without state."""
    dtype = torch.bfloat16 if recipe == "residual" else torch.float32
    model, restored = model_of(dtype), model_of(dtype)
    optimizer, other = RECIPES[recipe](model), RECIPES[recipe](restored)
    for _ in range(4):
        optimizer.step(closure_of(model))
    before = bits(model)
    weights, states = get_state_dict(model, optimizer)
    assert same(before, bits(model))
    set_state_dict(restored, other, model_state_dict=weights, optim_state_dict=states)
    assert same(before, bits(restored))
    for each, its in ((model, optimizer), (restored, other)):
        its.step(closure_of(each))
        assert all(parameter.grad is None for parameter in each.parameters())
        assert its.param_groups[0]["step"] == 5
    assert same(bits(model), bits(restored))
    assert not same(before, bits(model))


def test_a_distributed_checkpoint_keeps_pending_estimates() -> None:
    model, plain = model_of(), model_of()
    optimizer, other = RECIPES["mezo"](model), RECIPES["mezo"](plain)
    optimizer.estimate(closure_of(model))
    get_state_dict(model, optimizer)
    optimizer.step()
    other.step(closure_of(plain))
    assert same(bits(model), bits(plain))


def test_a_step_at_an_lr_of_zero_is_a_step() -> None:
    """As in a warm-up, also with gradients left over from elsewhere."""
    model = model_of()
    optimizer = zoext.MeZO(model, lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="nothing to apply"):
        optimizer.step()
    optimizer.estimate(closure_of(model))
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


def test_a_loop_for_gradients_is_told_what_it_becomes() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, lr=1e-2)
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"estimate\(closure\) first, or step\(closure\)$"):
        optimizer.step()
    closure_of(model)().backward()
    with pytest.raises(RuntimeError, match=r"replace backward\(\) and step\(\) by step\(lambda: loss_of"):
        optimizer.step()
    assert same(before, bits(model))


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_a_closure_with_backward_is_told_which_line_to_delete(probe: str) -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, lr=1e-2, probe=probe)
    before = bits(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = closure_of(model)()
        loss.backward()
        return loss

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Delete its backward\(\) line"):
            optimizer.step(closure)
    close = 0 if probe == "streamed" else 1e-6
    assert all(torch.allclose(a, b, rtol=0, atol=close) for a, b in zip(before, bits(model), strict=True))
    optimizer.step(closure_of(model))
    assert optimizer.param_groups[0]["step"] == 1


def test_other_errors_of_a_closure_are_its_own() -> None:
    def closure() -> Tensor:
        raise RuntimeError("no such batch")

    with pytest.raises(RuntimeError, match=r"^no such batch$"):
        zoext.MeZO(model_of(), lr=1e-2).step(closure)


def test_a_gradient_scaler_is_refused_and_leaves_nothing() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # makes its scale, as scaling a loss does
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"call optimizer\.step\(closure\), with a model in bfloat16"):
        scaler.step(optimizer, closure_of(model))
    optimizer.estimate(closure_of(model))
    with pytest.raises(RuntimeError, match=r"GradScaler\.step"):
        scaler.step(optimizer)
    assert same(before, bits(model))
    optimizer.step()
    assert not same(before, bits(model))


def test_a_disabled_scaler_steps() -> None:
    model, plain = model_of(), model_of()
    optimizer, other = RECIPES["mezo"](model), RECIPES["mezo"](plain)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer, closure_of(model))
    other.step(closure_of(plain))
    assert same(bits(model), bits(plain))


def test_a_learning_rate_of_zero_takes_steps() -> None:
    """The first step of a warm-up, in a loop that keeps gradients of zero."""
    model = model_of()
    optimizer = zoext.MeZO(model, lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.estimate(closure_of(model))
    assert torch.isfinite(optimizer.step())
    assert optimizer.param_groups[0]["step"] == 1


def test_derivatives_without_gradients_are_told_how_to_enable_them() -> None:
    model, x = model_of(), X.clone().requires_grad_()
    optimizer = zoext.MeZO(model)
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad.*within torch\.enable_grad\(\)"):
        optimizer.step(lambda: torch.autograd.grad(model(x).sum(), x)[0].square().sum())
