"""A run that cannot learn, since its losses do not depend on what moves, says so with the cause."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoext

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
TOLD = (
    r"last 4 estimates were bit-identical.* another model.*merged or disabled.*"
    r"a reward that all candidates get or all miss.*mu is too small"
)
RECIPES: dict[str, Callable[..., zoext.ZerothOrderOptimizer]] = {
    "mezo": zoext.MeZO,
    "one-sided": lambda model, **options: zoext.ZerothOrderOptimizer(
        model, estimator=zoext.ForwardDifference(samples=2), **options
    ),
    "gv": zoext.MeZOGV,
    "greedy": zoext.MeZOGreedy,
    "adamezo": zoext.AdaMeZO,
    **{
        shaping: lambda model, shaping=shaping, **options: zoext.ZerothOrderOptimizer(
            model, estimator=zoext.Population(7, shaping=shaping), **options
        )
        for shaping in ("centered", "zscore", "rank")
    },
}


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def accuracy_of(model: nn.Module) -> float:
    """Changes nowhere near theta."""
    return float((model(X).argmax(1) == 0).double().mean())


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_equal_losses_are_told_once(recipe: str, probe: str) -> None:
    model = model_of()
    optimizer = RECIPES[recipe](model, lr=1e-9, mu=1e-7, probe=probe)
    for _ in range(4):
        optimizer.step(lambda: accuracy_of(model))
    with pytest.warns(UserWarning, match=TOLD):
        optimizer.step(lambda: accuracy_of(model))
    for _ in range(6):  # warnings are errors here
        optimizer.step(lambda: accuracy_of(model))


def test_a_streak_that_ends_starts_again() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, lr=1e-9, mu=1e-3)

    def step(constant: bool) -> None:
        optimizer.step(lambda: model(X).square().mean() * (0 if constant else 1))

    for constant in (True, True, True, False, True, True, True, True):
        step(constant)
    with pytest.warns(UserWarning, match=TOLD):
        step(True)


def test_losses_that_differ_in_a_bit_are_a_slope() -> None:
    optimizer = zoext.MeZO(model_of(), probe="inplace")
    losses = iter([1.0, 1.0 + 2.0**-52] * 8)
    for _ in range(8):
        optimizer.step(lambda: next(losses))  # a warning would be an error
        assert optimizer.last_estimate is not None
        assert optimizer.last_estimate.coefficients != 0


def test_micro_batches_count_as_estimates() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, lr=1e-9, probe="inplace")
    for _ in range(4):
        optimizer.estimate(lambda: 0.5)
    with pytest.warns(UserWarning, match=TOLD):
        optimizer.estimate(lambda: 0.5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_streamed_probe_that_displaces_nothing_is_refused(recipe: str) -> None:
    model = model_of()
    another = copy.deepcopy(model)
    optimizer = RECIPES[recipe](model, probe="streamed")
    before = [parameter.clone() for parameter in model.parameters()]
    message = r"ran no module that owns a weight of the optimizer \(0\.weight, 0\.bias, .* and 1 more\)"
    for _ in range(2):
        with pytest.raises(zoext.StreamedProbeError, match=message):
            optimizer.step(lambda: another(X).square().mean())
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.step(lambda: model(X).square().mean())


def test_parts_of_a_model_may_rest() -> None:
    """Once something was displaced, a step without it is only told by its losses."""
    model = model_of()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = zoext.MeZO(model, lr=1e-9, probe="streamed")
    optimizer.step(lambda: model(X).square().mean())

    def without_head() -> Tensor:
        return model[0](X).square().mean()

    for _ in range(4):
        optimizer.step(without_head)
    with pytest.warns(UserWarning, match=TOLD):
        optimizer.step(without_head)


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("how", ["merged", "disabled"])
def test_an_adapter_that_is_not_read(how: str, probe: str) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    torch.manual_seed(0)
    model = peft.get_peft_model(model_of(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    if how == "merged":
        model.merge_adapter()

    def closure() -> Tensor:
        if how == "merged":
            return model(X).square().mean()
        with model.disable_adapter():
            return model(X).square().mean()

    optimizer = zoext.MeZO(model, lr=1e-9, probe=probe)
    if probe == "streamed":
        with pytest.raises(zoext.StreamedProbeError, match="adapters neither merged nor disabled"):
            optimizer.step(closure)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.step(closure)
    assert [str(each.message)[:20] for each in told if "bit-identical" in str(each.message)]


def test_warnings_name_the_line_of_the_program() -> None:
    model = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="is more than the columns") as found:
        optimizer = zoext.LOZO(model, rank=5)
    assert found[0].filename == __file__
    for _ in range(4):
        optimizer.estimate(lambda: model(torch.ones(3)).sum() * 0)
        optimizer.step()
    with pytest.warns(UserWarning, match="bit-identical") as found:
        optimizer.estimate(lambda: model(torch.ones(3)).sum())
    assert found[0].filename == __file__
