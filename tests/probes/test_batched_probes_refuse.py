"""What a batched probe cannot run right is refused by name, with theta and the model as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zoext
from zoext import BatchedProbeError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


def model_of(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 2))


def refused(
    model: nn.Module, closure: Callable[..., Any], match: str, error: type[Exception] = BatchedProbeError
) -> None:
    """A step raises, and afterwards a step with a right closure is the step of a fresh optimizer."""
    before = copy.deepcopy(model.state_dict())
    optimizer = zoext.MeZO(model, lr=1e-2, probe="batched")
    with pytest.raises(error, match=match):
        optimizer.step(closure)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert optimizer.param_groups[0]["step"] == 0


def right(model: nn.Module) -> Callable[[int], Tensor]:
    return lambda copies: zoext.mean_per_copy(model(X.repeat(copies, 1)).square().mean(1), copies)


@pytest.mark.parametrize(
    ("closure", "error", "match"),
    [
        (lambda model: lambda: model(X).mean(), TypeError, "closure.*copies.*zoext.repeat"),
        (lambda model: lambda copies: model(X).mean(), ValueError, r"shape \(2,\), not \(\).*mean_per_copy"),
        (lambda model: lambda copies: model(X.repeat(copies, 1)).mean(1), ValueError, r"\(2,\), not \(8,\)"),
        (lambda model: lambda copies: [1.0, 2.0], TypeError, "a tensor with a loss for each of 2 copies"),
        (lambda model: lambda copies: None, TypeError, "closure must return the loss"),
        (lambda model: 3, TypeError, "closure must be a function"),
    ],
    ids=["no copies", "a scalar", "too many", "a list", "nothing", "no function"],
)
def test_closures(closure: Any, error: type[Exception], match: str) -> None:
    model = model_of()
    refused(model, closure(model), match, error)


def test_losses_of_other_batches() -> None:
    """The closure divides its batch among the copies, or draws another one for each."""
    model = model_of()
    refused(
        model, lambda copies: model(X).square().mean(1).view(copies, -1).mean(1), "copies of the batch have"
    )

    def drawn(copies: int) -> Tensor:
        x = torch.randn(4 * copies, 6)
        return zoext.mean_per_copy(model(x).square().mean(1), copies)

    refused(model, drawn, "copies of the batch have different losses.*draw random numbers before")


def test_losses_that_depend_on_other_copies() -> None:
    model = model_of()

    def centred(copies: int) -> Tensor:
        losses = right(model)(copies)
        return losses - losses.mean().detach()

    refused(model, centred, "copies of the batch see each other.*mean_per_copy")

    def interleaved(copies: int) -> Tensor:
        """Each example repeated, rather than the batch."""
        losses = model(X.repeat_interleave(copies, 0)).square().mean(1)
        return losses.view(-1, copies).mean(0)

    refused(model, interleaved, "copies of the batch")


class Mixes(nn.Module):
    """Subtracts the mean over examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y - y.mean(0)


class Capacity(nn.Module):
    """Experts that take at most four rows of a batch, as those of a mixture with a capacity."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(1)
        out = x.clone()
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()[:4]
            out[rows] = expert(x[rows])
        return out


class Functional(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.BatchNorm1d(6), r"1 \(BatchNorm1d\) normalizes over all copies in training; call its eval"),
        (nn.AlphaDropout(0.2), r"1 \(AlphaDropout\) draws other random numbers"),
        (Functional(functional.dropout), "drops out values by .*, outside of nn.Dropout.*model.eval"),
        (Mixes(), "copies of the batch see each other.*1.layer"),
    ],
    ids=["batch norm", "alpha dropout", "functional dropout", "mean over examples"],
)
def test_modules_that_mix_copies(layer: nn.Module, match: str) -> None:
    model = model_of(layer)
    refused(model, right(model), match)


def test_mixtures_with_a_capacity() -> None:
    model = model_of(Capacity())
    refused(model, right(model), r"1.experts.0 has more or fewer rows .*freeze it")


def test_batch_norm_in_evaluation_runs() -> None:
    model = model_of(nn.BatchNorm1d(6)).eval()
    zoext.MeZO(model, lr=1e-2, probe="batched").step(right(model))


class ReadsItsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.child.weight, self.child.bias)


def test_weights_that_are_read_elsewhere() -> None:
    model = model_of(ReadsItsChild())
    refused(model, right(model), "1.child.weight, 1.child.bias are read while the module that owns them")


class SharedInput(nn.Module):
    """A module of which all copies have the same input, whose output the model needs as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table(torch.arange(6)).T.contiguous().view(6, 6)


def test_modules_whose_input_has_no_copies() -> None:
    model = model_of(SharedInput())
    refused(model, right(model), "1.table is the same for all copies.*freeze it")


def test_a_closure_that_runs_another_model() -> None:
    model, other = model_of(), model_of()
    refused(model, right(other), "ran no module that owns a weight")


def test_derivatives() -> None:
    model = model_of()

    def closure(copies: int) -> Tensor:
        with torch.enable_grad():
            x = X.repeat(copies, 1).requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x)
        return zoext.mean_per_copy(slope.square().sum(1), copies)

    refused(model, closure, "runs with gradients enabled")


def test_a_copy_of_the_model() -> None:
    model = model_of()
    refused(model, lambda copies: right(copy.deepcopy(model))(copies), "copies 0, and a copy would not be")


def test_buffers_that_are_written() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x

    model = model_of(Counts())
    optimizer = zoext.MeZO(model, probe="batched")
    with pytest.raises(BatchedProbeError, match=r"writes to buffers, which all copies share: 1.count"):
        optimizer.step(right(model))


def test_compiled_and_missing_modules() -> None:
    with pytest.raises(TypeError, match=r"compiled.*pass the module it was made from"):
        zoext.MeZO(torch.compile(model_of(), backend="eager"), probe="batched")
    with pytest.raises(ValueError, match=r"probe='batched' needs the nn.Module"):
        zoext.MeZO(list(model_of().parameters()), probe="batched")
    with pytest.raises(ValueError, match=r"max_copies must be an integer of at least 1, not 0"):
        zoext.BatchedProbe(model_of(), max_copies=0)


def test_what_runs_later_is_checked_as_well() -> None:
    """A branch that the first steps did not take, and a mode that they did not have."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixes, self.plain, self.takes = Mixes(), nn.Linear(6, 6), "plain"

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.takes)(x)

    model = model_of(Branches(), nn.BatchNorm1d(6)).eval()
    optimizer = zoext.MeZO(model, lr=1e-3, probe="batched")
    for _ in range(3):
        optimizer.step(right(model))
    model.train()
    with pytest.raises(BatchedProbeError, match="BatchNorm1d"):
        optimizer.step(right(model))
    model.eval()[1].takes = "mixes"
    with pytest.raises(BatchedProbeError, match="see each other"):
        optimizer.step(right(model))
