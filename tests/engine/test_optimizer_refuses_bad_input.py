"""Each mistake raises an error that names the argument, its value and the remedy; weights unharmed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import zoext


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (3,)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mu": 0.0}, ValueError, "mu must be finite and > 0, not 0.0"),
        ({"mu": -1e-3}, ValueError, "mu must be finite and > 0, not -0.001"),
        ({"mu": float("nan")}, ValueError, "mu must be finite"),
        ({"mu": "1e-3"}, TypeError, "mu must be a float, not '1e-3'"),
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0, not -1.0"),
        ({"lr": torch.ones(2)}, TypeError, "lr must be a float"),
        ({"lr": torch.ones(1)}, TypeError, r"shape \(\), not a torch.float32 tensor of shape \(1,\)"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be finite and >= 0, not -1.0"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be finite"),
        ({"seed": 2**64}, ValueError, "seed must fit into 64 bits"),
        ({"samples": 0}, ValueError, "samples must be an integer of at least 1, not 0"),
        ({"samples": 1.5}, ValueError, "samples must be an integer"),
        ({"probe": "stream"}, ValueError, "probe must be 'auto', 'inplace', 'streamed'"),
        ({"probe": "streamed"}, ValueError, "pass the module as params"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be 'raise' or 'skip', not 'ignore'"),
    ],
)
def test_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        zoext.MeZO([parameter()], **options)  # type: ignore[arg-type]


def test_axes() -> None:
    with pytest.raises(TypeError, match="direction must be a Direction"):
        zoext.ZerothOrderOptimizer([parameter()], direction=zoext.SGD())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"estimator must be an? Estimator"):
        zoext.ZerothOrderOptimizer([parameter()], estimator="spsa")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: nn.Parameter(torch.ones(3, 1).expand(3, 4)), r"share memory.*contiguous\(\)"),
        (lambda: nn.Parameter(torch.ones(3, dtype=torch.complex64)), "dtype torch.complex64"),
        (lambda: nn.Parameter(torch.ones(3, device="meta")), "meta device.*to_empty"),
        (lambda: nn.Parameter(torch.eye(3).to_sparse()), "layout torch.sparse_coo"),
        (lambda: nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn)), "dtype torch.float8_e4m3fn"),
        (lambda: nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3))), "is a TwoTensor"),
    ],
)
def test_parameters_that_cannot_move(bad: object, message: str) -> None:
    tensor = bad()  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        zoext.MeZO([parameter(), tensor])
    with pytest.raises(ValueError, match=r"layer\.bad"):
        zoext.MeZO([("layer.good", parameter()), ("layer.bad", tensor)])
    optimizer = zoext.MeZO([parameter()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [tensor]})
    assert len(optimizer.param_groups) == 1
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"weight is lazy.*run the model once"):
        zoext.MeZO(lazy)
    frozen = tensor.detach()
    if frozen.device.type != "meta":
        zoext.MeZO([parameter(), frozen]).step(lambda: 1.0)  # frozen, it may be anything


def test_frozen_integers_are_welcome() -> None:
    moving, frozen = parameter(), torch.ones(3, dtype=torch.int8)
    before = moving.detach().clone()
    zoext.MeZO([moving, frozen], lr=0.1).step(lambda: moving.square().sum())
    assert not torch.equal(moving, before)
    assert torch.equal(frozen, torch.ones(3, dtype=torch.int8))


def test_parameter_lists() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        zoext.MeZO([])
    with pytest.raises(ValueError, match="empty parameter list"):
        zoext.MeZO(nn.Tanh())
    with pytest.raises(TypeError, match="must be a Tensor, not str"):
        zoext.MeZO(["weight"])
    with pytest.raises(TypeError, match="set"):
        zoext.MeZO([{"params": {parameter()}}])
    tied = parameter()
    with pytest.raises(ValueError, match="given twice"):
        zoext.MeZO([tied, parameter(), tied])
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RuntimeError, match="no parameter of the optimizer requires grad"):
        zoext.MeZO(frozen).step(lambda: 1.0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "forget to return the loss"),
        (torch.ones(3), ValueError, r"tensor of shape \(3,\)"),
        (torch.ones(0), ValueError, r"tensor of shape \(0,\)"),
        ("0.5", TypeError, "'0.5'"),
        (torch.tensor(1j), TypeError, "real number"),
        ([1.0], TypeError, "closure must return"),
    ],
)
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_closures_that_return_no_number(
    value: object, error: type[Exception], message: str, probe: str
) -> None:
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    optimizer = zoext.MeZO(model, probe=probe, mu=2.0**-4)

    def closure() -> object:
        model(torch.ones(3))
        return value

    with pytest.raises(error, match=message):
        optimizer.step(closure)  # type: ignore[arg-type]
    assert torch.allclose(model.weight, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("change", ["add", "freeze", "move"])
def test_closures_that_change_the_parameters(probe: str, change: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = zoext.MeZO(model, probe=probe)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    elsewhere = before[-1].clone()

    def closure() -> float:
        loss = float(model(torch.ones(3)).sum())
        if change == "add":
            optimizer.add_param_group({"params": [("new", parameter())]})
        elif change == "freeze":
            model[0].weight.requires_grad_(False)
        else:
            model[1].bias.data = elsewhere
        return loss

    name = {"add": "new", "freeze": r"0\.weight", "move": r"1\.bias"}[change]
    with pytest.raises(
        RuntimeError, match=rf"parameters .* changed since the closure began: {name}\. If a mod"
    ):
        optimizer.step(closure)
    if (probe, change) == ("inplace", "move"):
        return  # the displacement stayed behind in the old memory, and no one can know that
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_module_whose_parameter_was_replaced(steps: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = zoext.MeZO(model)
    for _ in range(steps):
        optimizer.step(lambda: model(torch.ones(3)).sum())
    model[1].weight = parameter(3, 3)
    with pytest.raises(ValueError, match=r"1\.weight is not a parameter of the module"):
        optimizer.step(lambda: model(torch.ones(3)).sum())


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_a_closure_that_estimates(probe: str) -> None:
    model = nn.Linear(3, 3)
    optimizer = zoext.MeZO(model, probe=probe)
    with pytest.raises(RuntimeError, match="called by its own closure"):
        optimizer.step(lambda: optimizer.estimate(lambda: 1.0).loss)
    assert optimizer.step(lambda: model(torch.ones(3)).sum()).isfinite()
    assert optimizer.last_estimate.forwards == 2


def test_what_changes_between_an_estimate_and_its_step() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    optimizer = zoext.MeZO([{"params": layer.parameters()} for layer in model], mu=0.5)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def unfreeze() -> None:
        model[1].weight.requires_grad_(True)

    def change_mu() -> None:
        optimizer.param_groups[1]["mu"] = 0.25

    for change in (unfreeze, change_mu):
        optimizer.estimate(lambda: 1.0)
        change()
        with pytest.raises(RuntimeError, match="changed since the estimate was made"):
            optimizer.step()
        for a, b in zip(before, model.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)
        optimizer.step(lambda: 1.0)


def test_states_of_other_optimizers() -> None:
    model = nn.Linear(3, 3)
    optimizer = zoext.MeZO(model)
    with pytest.raises(ValueError, match="has no mu, precision, recipe, seed, step"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    assert optimizer.step(lambda: model(torch.ones(3)).sum()).isfinite()


@pytest.mark.parametrize(("name", "value"), [("precision", "residual"), ("seed", 5), ("recipe", {})])
def test_what_belongs_to_the_whole_optimizer(name: str, value: object) -> None:
    model = nn.Linear(3, 3).to(torch.bfloat16)
    with pytest.raises(ValueError, match=f"{name} belongs to the whole optimizer"):
        zoext.MeZO([{"params": list(model.parameters()), name: value}])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("mu", -1e-3, ValueError),
        ("mu", 0.0, ValueError),
        ("weight_decay", float("nan"), ValueError),
        ("weight_decay", torch.tensor(0.1), TypeError),
        ("lr", "fast", TypeError),
    ],
)
def test_options_that_were_changed_between_steps(name: str, value: object, error: type[Exception]) -> None:
    model = nn.Linear(3, 3)
    parameters = list(model.parameters())
    optimizer = zoext.MeZO([{"params": parameters[:1]}, {"params": parameters[1:]}])
    optimizer.param_groups[1][name] = value
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(error, match=f"{name} must be"):
        optimizer.step(lambda: model(torch.ones(3)).sum())
    assert all(map(torch.equal, parameters, before))


@pytest.mark.parametrize("update", [zoext.AdamReplay(), zoext.ScalarAdam(), zoext.SignReplay()])
def test_updates_that_divide_by_coefficients_that_cancel(update: zoext.Update) -> None:
    pool = zoext.GuidingVector(pool_size=2)
    if not isinstance(update, zoext.ScalarAdam):
        zoext.ZerothOrderOptimizer(nn.Linear(2, 1), estimator=pool, update=update)
        return
    with pytest.raises(ValueError, match=r"update: ScalarAdam divides by .* zero for GuidingVector; use"):
        zoext.ZerothOrderOptimizer(nn.Linear(2, 1), estimator=pool, update=update)


def test_a_loss_in_place_of_a_closure() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"closure must be a function .*, not Tensor: step\(lambda: loss_of"):
        zoext.MeZO(model).step(model(torch.ones(3)).sum())  # type: ignore[arg-type]
