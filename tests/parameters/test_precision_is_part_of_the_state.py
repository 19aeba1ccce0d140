"""What ``precision="residual"`` keeps beside the weights is saved, loaded, copied and moved with them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.faulty_runs import NAMED, FaultyRun, bytes_of
from support.graphed_runs import same

HALVES = (torch.bfloat16, torch.float16)


def residuals(run: FaultyRun) -> list[Tensor]:
    return [run.optimizer.state[parameter]["residual"] for parameter in run.model.parameters()]


def saved_and_read(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("recipe", NAMED)
def test_a_run_goes_on_from_a_saved_state(recipe: str, dtype: torch.dtype) -> None:
    run = FaultyRun(recipe, dtype, precision="residual")
    run.healthy(4)
    model, state = saved_and_read(run.state())
    again = FaultyRun(recipe, dtype, precision="residual", lr=0.7)
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(state)
    for own, other in zip(residuals(run), residuals(again), strict=True):
        assert (
            own.dtype == other.dtype == torch.int8
        )  # not the dtype of the parameter, as torch would have it
        assert torch.equal(own, other)
        assert own.data_ptr() != other.data_ptr()
    assert any(residual.any() for residual in residuals(again))
    run.healthy(3)
    again.healthy(3)
    assert same(run.state(), again.state())
    assert same(saved_and_read(run.state()), run.state())


def test_without_its_residuals_a_run_goes_elsewhere() -> None:
    """So that the test above could fail."""
    run = FaultyRun("mezo", torch.bfloat16, precision="residual")
    run.healthy(4)
    forgetful = copy.deepcopy(run)
    for residual in residuals(forgetful):
        residual.zero_()
    run.healthy(3)
    forgetful.healthy(3)
    assert not same(run.state()[0], forgetful.state()[0])


@pytest.mark.parametrize("theirs", ["nearest", "stochastic", "residual"])
@pytest.mark.parametrize("ours", ["nearest", "stochastic", "residual"])
def test_another_precision_is_refused(ours: str, theirs: str) -> None:
    run, other = (FaultyRun("mezo", torch.bfloat16, precision=name) for name in (ours, theirs))
    run.step()
    other.healthy(2)
    before = copy.deepcopy(run.state())
    if ours == theirs:
        run.optimizer.load_state_dict(other.optimizer.state_dict())
        return
    with pytest.raises(ValueError, match=f"precision='{theirs}', this optimizer has '{ours}'"):
        run.optimizer.load_state_dict(other.optimizer.state_dict())
    assert same(run.state(), before)


@pytest.mark.parametrize(
    "residual", [torch.zeros(3, dtype=torch.int8), torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.int8), 0]
)
def test_residuals_that_do_not_fit_are_refused(residual: object) -> None:
    run = FaultyRun("mezo", torch.bfloat16, precision="residual")
    run.step()
    state = copy.deepcopy(run.optimizer.state_dict())
    state["state"][0]["residual"] = residual
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match="residual"):
        run.optimizer.load_state_dict(state)
    assert same(run.state(), before)


@pytest.mark.parametrize("precision", ["Residual", "", "24 bits", None, 2, "NEAREST"])
def test_precisions_that_there_are_not(precision: object) -> None:
    with pytest.raises(ValueError, match="precision must be one of 'nearest', 'stochastic', 'residual', not"):
        zoext.MeZO(nn.Linear(2, 2), precision=precision)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["nearest", "stochastic"])
def test_others_keep_nothing(precision: str) -> None:
    run = FaultyRun("mezo", torch.bfloat16, precision=precision)
    run.healthy(2)
    assert run.optimizer.state_dict()["state"] == {}
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.optimizer.state_dict()["state"] == {}


def test_only_weights_of_16_bits_have_one() -> None:
    """One byte a weight."""
    run = FaultyRun("mezo", torch.bfloat16, precision="residual")
    run.model[1].float()
    run.model[3].double()
    model = run.model

    def closure() -> Tensor:
        x = model[0](torch.ones(4, 3, dtype=torch.bfloat16)).float()
        return model[3](model[2](model[1](x)).double()).square().mean()

    run.optimizer.step(closure)
    for name, parameter in model.named_parameters():
        residual = run.optimizer.state.get(parameter, {}).get("residual")
        if parameter.dtype == torch.bfloat16:
            assert residual is not None, name
            assert (residual.dtype, residual.shape) == (torch.int8, parameter.shape)
        else:
            assert residual is None, name
    again = copy.deepcopy(run)
    again.optimizer.load_state_dict(saved_and_read(run.optimizer.state_dict()))
    assert same(again.optimizer.state_dict(), run.optimizer.state_dict())


def test_parameters_get_one_when_they_are_thawed_and_keep_it_when_they_are_frozen() -> None:
    run = FaultyRun("mezo", torch.bfloat16, precision="residual")
    weight = run.model[3].weight.requires_grad_(False)
    run.healthy(2)
    assert weight not in run.optimizer.state
    weight.requires_grad_(True)
    run.healthy(2)
    residual = run.optimizer.state[weight]["residual"]
    assert residual.any()
    weight.requires_grad_(False)
    before = residual.clone()
    run.healthy(2)
    assert run.optimizer.state[weight]["residual"] is residual
    assert torch.equal(residual, before)


def test_groups_that_are_added_get_one() -> None:
    run = FaultyRun("mezo", torch.bfloat16, precision="residual")
    run.optimizer = zoext.MeZO(run.model[:3], lr=1e-2, precision="residual", probe="inplace")
    run.step()
    run.optimizer.add_param_group({"params": list(run.model[3].named_parameters())})
    run.step()
    assert run.optimizer.state[run.model[3].weight]["residual"].any()


def test_they_follow_a_model_whose_memory_is_replaced() -> None:
    """As by ``model.to(device)``; a parameter that gets another shape begins anew."""
    run, never_moved = (FaultyRun("mezo", torch.bfloat16, precision="residual") for _ in range(2))
    for each in (run, never_moved):
        each.healthy(3)
    for parameter in run.model.parameters():
        parameter.data = parameter.data.clone()
    for each in (run, never_moved):
        each.healthy(3)
    assert same(run.state(), never_moved.state())


def test_a_deep_copy_has_its_own() -> None:
    run = FaultyRun("adamezo", torch.float16, precision="residual")
    run.healthy(3)
    twin = copy.deepcopy(run)
    before = [bytes_of(residual) for residual in residuals(twin)]
    run.healthy(2)
    assert [bytes_of(residual) for residual in residuals(twin)] == before
    twin.healthy(2)
    assert same(run.state(), twin.state())


def test_a_failed_step_leaves_them_alone_in_a_state_that_was_loaded() -> None:
    run = FaultyRun("mezo", torch.bfloat16, precision="residual")
    run.healthy(2)
    run.optimizer.load_state_dict(saved_and_read(run.optimizer.state_dict()))
    bits = run.bits()
    with pytest.raises(FloatingPointError):
        run.step(lambda loss: loss * float("nan"))
    assert run.bits() == bits


def test_hooks_of_the_user_see_and_change_what_is_loaded() -> None:
    run = FaultyRun("mezo", torch.bfloat16, precision="residual")
    run.healthy(4)
    saved = copy.deepcopy(run.optimizer.state_dict())
    seen = []

    def forget(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(state["state"]))
        cleared = {
            name: {**own, "residual": torch.zeros_like(own["residual"])}
            for name, own in state["state"].items()
        }
        return {**state, "state": cleared}

    run.optimizer.register_load_state_dict_pre_hook(forget)
    run.optimizer.register_load_state_dict_post_hook(
        lambda optimizer: seen.append([own["residual"].dtype for own in optimizer.state.values()])
    )
    run.optimizer.load_state_dict(saved)
    count = len(saved["state"])
    assert seen == [count, [torch.int8] * count]
    assert not any(residual.any() for residual in residuals(run))


def test_other_data_in_the_state_is_kept_as_torch_keeps_it() -> None:
    run = FaultyRun("mezo", torch.bfloat16, precision="residual")
    run.healthy(1)
    parameter = next(run.model.parameters())
    run.optimizer.state[parameter]["seen"] = 7
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict(saved)
    assert run.optimizer.state[parameter]["seen"] == 7
    assert run.optimizer.state[parameter]["residual"].dtype == torch.int8
