"""Batched slopes are the streamed ones, or an error names the module, whatever modules do with weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zoext
from zoext.probes._batched.errors import BatchedProbeError
from zoext.probes._writes import WeightWriteError

BATCH, WIDTH = 3, 6
Losses = Callable[[int], Tensor]
DIRECTIONS = {"gaussian": zoext.Gaussian(), "lozo": zoext.LowRank(rank=2)}


def losses_of(model: nn.Module, *, batch: int = BATCH) -> Losses:
    x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def losses(copies: int) -> Tensor:
        return zoext.mean_per_copy(model(x.repeat(copies, 1)).square().sum(1), copies)

    return losses


def slopes(
    make: Callable[[], tuple[nn.Module, Losses]],
    probe: str,
    direction: str = "gaussian",
    steps: int = 3,
    change: Callable[[nn.Module, int], None] = lambda model, step: None,
) -> list[list[float]]:
    torch.manual_seed(0)
    model, losses = make()
    optimizer = zoext.ZerothOrderOptimizer(
        model, direction=DIRECTIONS[direction], lr=0.0, mu=1e-2, probe=probe, seed=4
    )
    found = []
    for step in range(steps):
        change(model, step)
        torch.manual_seed(5)
        estimate = optimizer.estimate((lambda: losses(1)[0]) if probe == "streamed" else losses)
        found.append(estimate.coefficients.tolist())
        optimizer.step()
    return found


def same(make: Callable[[], tuple[nn.Module, Losses]], *args: Any, **options: Any) -> None:
    expected = slopes(make, "streamed", *args, **options)
    torch.testing.assert_close(slopes(make, "batched", *args, **options), expected, rtol=1e-7, atol=1e-9)


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers, nn.Linear(WIDTH, 2)).double()


def plain(*layers: nn.Module, train: bool = False) -> tuple[nn.Module, Losses]:
    model = sequence(*layers).train(train)
    return model, losses_of(model)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("position", [0, 1])
def test_forwards_that_others_replaced(direction: str, position: int) -> None:
    def make() -> tuple[nn.Module, Losses]:
        model, losses = plain(nn.LayerNorm(WIDTH))
        original = model[position].forward  # type: ignore[index]
        model[position].forward = lambda x: 3 * original(x).tanh()  # type: ignore[index]
        return model, losses

    same(make, direction)


def test_a_forward_that_is_replaced_later() -> None:
    def change(model: Any, step: int) -> None:
        if step == 2:
            original = model[0].forward
            model[0].forward = lambda x: 3 * original(x)

    same(plain, change=change)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_subclasses_of_transposed_linear_layers(direction: str) -> None:
    transformers = pytest.importorskip("transformers.pytorch_utils")

    class Scaled(transformers.Conv1D):  # type: ignore[name-defined, misc]
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = 2 * super().forward(x.tanh())
            return found

    same(lambda: plain(Scaled(WIDTH, WIDTH)), direction)


class ReadsLater(nn.Module):
    """Reads the weight of a layer that it called before, from its second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.reads = nn.Linear(WIDTH, WIDTH), False

    def forward(self, x: Tensor) -> Tensor:
        if self.reads:
            return functional.linear(self.layer(x), self.layer.weight)
        return self.layer(x)  # type: ignore[no-any-return]


def test_a_weight_that_is_read_elsewhere_later() -> None:
    def change(model: Any, step: int) -> None:
        model[1].reads = step == 2  # a session without a check

    with pytest.raises(BatchedProbeError, match=r"1.layer.weight is read while the module .* does not run"):
        slopes(lambda: plain(ReadsLater()), "batched", change=change)


def test_weights_that_are_tied_later() -> None:
    def change(model: Any, step: int) -> None:
        if step == 2:
            model[1].weight = model[0].weight

    def make() -> tuple[nn.Module, Losses]:
        model, losses = plain(nn.Linear(WIDTH, WIDTH))
        model[1].requires_grad_(False)  # type: ignore[index]
        return model, losses

    same(make, change=change)


class DropsOut(nn.Module):
    """Runs copy by copy, with dropout within."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.dropout = nn.Parameter(torch.ones(WIDTH)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x * self.scale)  # type: ignore[no-any-return]


def test_dropout_within_modules_that_run_copy_by_copy() -> None:
    same(lambda: plain(DropsOut(), train=True))


class ReducesItsWeight(nn.Module):
    """A norm by its name, which does not multiply with its weight only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight / self.weight.abs().max()


def test_norms_that_compute_something_else() -> None:
    same(lambda: plain(type("OddRMSNorm", (ReducesItsWeight,), {})()))


class OwnTable(nn.Embedding):
    """An embedding that reads its table without ``functional.embedding``."""

    def forward(self, index: Tensor) -> Tensor:
        return self.weight[index] * 2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", [OwnTable, nn.Embedding])
def test_embeddings_that_read_otherwise(kind: type[nn.Embedding], direction: str) -> None:
    def make() -> tuple[nn.Module, Losses]:
        model = nn.Sequential(kind(7, WIDTH), nn.Flatten(), nn.Linear(2 * WIDTH, 2)).double()
        index = torch.tensor([[1, 2], [0, 6], [2, 2]])
        return model, lambda copies: zoext.mean_per_copy(
            model(index.repeat(copies, 1)).square().sum(1), copies
        )

    same(make, direction)


def test_rows_that_do_not_exist() -> None:
    def make() -> tuple[nn.Module, Losses]:
        model = nn.Sequential(nn.Embedding(100, WIDTH)).double()
        index = torch.tensor([[1], [-1]])
        return model, lambda copies: zoext.mean_per_copy(model(index.repeat(copies, 1)).sum((1, 2)), copies)

    with pytest.raises(IndexError):
        slopes(make, "batched")


class WithState(nn.Module):
    """A recurrent layer whose state of zeros has another dimension of copies than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(1, WIDTH, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(2, len(x), WIDTH)
        return self.inner(x.unsqueeze(2), (state, state))[0][:, -1]  # type: ignore[no-any-return]


def test_a_state_of_zeros() -> None:
    same(lambda: plain(WithState()))


class SharedTypes(nn.Module):
    """Adds a row of a table, of zero for all positions, that all copies share."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.zeros(1, x.shape[1], dtype=torch.long)).squeeze(2)  # type: ignore[no-any-return]


def test_zeros_that_all_copies_share() -> None:
    def make() -> tuple[nn.Module, Losses]:
        model = nn.Sequential(nn.Linear(WIDTH, 4), SharedTypes()).double()
        return model, losses_of(model)

    same(make)


class Rotated(nn.Module):
    """Multiplies with a table whose halves are equal, as those of rotary embeddings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor, table: Tensor) -> Tensor:
        return h * table * self.scale


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Rotated(8)

    def forward(self, x: Tensor) -> Tensor:
        half = torch.linspace(0, 1, 12, dtype=x.dtype).view(1, 3, 4)
        table = torch.cat((half, half), 2).cos()
        h = x.unsqueeze(1) * torch.linspace(1, 2, 24, dtype=x.dtype).view(3, 8)
        return self.inner(h, table).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 3])
def test_tables_whose_halves_are_equal(batch: int) -> None:
    def make() -> tuple[nn.Module, Losses]:
        model = nn.Sequential(nn.Linear(WIDTH, 8), Rotary()).double()
        return model, losses_of(model, batch=batch)

    same(make)


class Packed(nn.Module):
    """Takes the tokens of all examples in one row, beside a tensor of examples."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)
        self.reads = reads

    def forward(self, mean: Tensor, packed: Tensor) -> Tensor:
        rows = packed[0, : 3 * len(mean)] if self.reads == "as many as it needs" else packed[0]
        return mean + (rows @ self.scale).view(len(mean), 3, WIDTH).mean(1)


class Packing(nn.Module):
    def __init__(self, reads: str) -> None:
        super().__init__()
        self.inner = Packed(reads)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1) * torch.linspace(1, 2, 3 * WIDTH, dtype=x.dtype).view(3, WIDTH)
        return self.inner(h.sum(1), h.reshape(1, -1, WIDTH))  # type: ignore[no-any-return]


@pytest.mark.parametrize("reads", ["all", "as many as it needs"])
@pytest.mark.parametrize("batch", [1, 4])
def test_examples_in_one_row(batch: int, reads: str) -> None:
    def make() -> tuple[nn.Module, Losses]:
        model = sequence(Packing(reads))
        return model, losses_of(model, batch=batch)

    same(make)


class Unclear(nn.Module):
    """Takes a table that looks like copies, and computes something else for fewer examples."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, h: Tensor, table: Tensor) -> Tensor:
        return h * table * self.scale * len(h)


def test_arguments_that_remain_unclear() -> None:
    rotary = Rotary()
    rotary.inner = Unclear()  # type: ignore[assignment]
    model = nn.Sequential(nn.Linear(WIDTH, 8), rotary).double()
    losses = losses_of(model)
    optimizer = zoext.MeZO(model, probe="batched")
    with pytest.raises(BatchedProbeError, match=r"1\.inner has a tensor of shape \(1, 3, 8\)"):
        optimizer.step(losses)


class Exhausted(Unclear):
    def forward(self, h: Tensor, table: Tensor) -> Tensor:
        if len(h) == BATCH:  # tried with one copy
            raise torch.OutOfMemoryError("no memory")
        return super().forward(h, table)


def test_errors_of_memory_in_a_trial_stay_themselves() -> None:
    rotary = Rotary()
    rotary.inner = Exhausted()  # type: ignore[assignment]
    model = nn.Sequential(nn.Linear(WIDTH, 8), rotary).double()
    losses = losses_of(model)
    with pytest.raises(torch.OutOfMemoryError):
        zoext.MeZO(model, probe="batched").step(losses)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 0)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x).sum(1, keepdim=True)

    same(lambda: plain(Empty()))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_state_of_one_layer(batch: int) -> None:
    def make() -> tuple[nn.Module, Losses]:
        state = WithState()
        state.inner = nn.LSTM(1, WIDTH, batch_first=True)
        state.forward = lambda x: state.inner(  # type: ignore[method-assign]
            x.unsqueeze(2), (x.new_zeros(1, len(x), WIDTH), x.new_ones(1, len(x), WIDTH))
        )[0][:, -1]
        model = sequence(state)
        return model, losses_of(model, batch=batch)

    same(make)


class Base(nn.Module):
    """Has positions, which all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.positions = nn.Linear(WIDTH, WIDTH), nn.Embedding(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unsqueeze(1) + self.positions(torch.arange(5))  # type: ignore[no-any-return]


@pytest.mark.parametrize("sizes", [(3,), (2, 3)])
def test_parts_that_the_closure_calls(sizes: tuple[int, ...]) -> None:
    def make() -> tuple[nn.Module, Losses]:
        model = nn.ModuleDict({"base": Base(), "head": nn.Linear(WIDTH, 2)}).double()
        batches = [torch.randn(size, WIDTH, dtype=torch.float64) for size in sizes]

        def losses(copies: int) -> Tensor:
            found = [model["head"](model["base"](x.repeat(copies, 1))).square().mean((1, 2)) for x in batches]
            return torch.stack([zoext.mean_per_copy(each, copies) for each in found]).sum(0)

        return model, losses

    same(make)


class PicksRows(nn.Module):
    """A layer for the rows with a positive score."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x, picked = x.clone(), x[:, 0] > -0.2
        x[picked] = self.layer(x[picked])
        return x


class Compares(nn.Module):
    """Compares all examples, as contrastive models do, at a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x @ x.T


class Accumulates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        total += self.weight
        return x * total


class WithTotal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Accumulates()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, torch.arange(WIDTH, dtype=x.dtype))  # type: ignore[no-any-return]


class AssignsAMean(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x


REFUSED = {
    "rows": (PicksRows(), r"1.layer has .* rows"),
    "contrast": (Compares(), r"output of 1 has shapes \(6, 6\) .* and \(6, 3\) copy by copy"),
    "shared": (WithTotal(), r"1.inner has a tensor that all copies share, and is written to"),
    "buffer": (AssignsAMean(), r"writes to buffers, which all copies share: 1.mean"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    layer, match = REFUSED[name]

    def make() -> tuple[nn.Module, Losses]:
        if name != "contrast":
            return plain(layer)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer).double()
        x = torch.randn(BATCH, WIDTH, dtype=torch.float64)

        def own(y: Tensor, copies: int) -> Tensor:
            return torch.stack(
                [y[copy * BATCH :, copy * BATCH :][:BATCH, :BATCH].sum() for copy in range(copies)]
            )

        return model, lambda copies: own(model(x.repeat(copies, 1)), copies)

    with pytest.raises(BatchedProbeError, match=match):
        slopes(make, "batched")


def test_buffers_that_are_assigned_are_put_back() -> None:
    model, losses = plain(AssignsAMean())
    before = model[1].mean  # type: ignore[index]
    with pytest.raises(BatchedProbeError):
        zoext.MeZO(model, probe="batched").estimate(losses)
    assert model[1].mean is before  # type: ignore[index]


def test_a_norm_of_the_table_that_is_written() -> None:
    model = nn.Sequential(nn.Embedding(7, WIDTH, max_norm=0.1)).double()
    before = model[0].weight.detach().clone()
    index = torch.tensor([[1], [2]])
    with pytest.raises((BatchedProbeError, WeightWriteError)):
        zoext.MeZO(model, probe="batched").estimate(
            lambda copies: zoext.mean_per_copy(model(index.repeat(copies, 1)).sum((1, 2)), copies)
        )
    assert torch.equal(model[0].weight, before)


def test_a_closure_that_writes_to_theta_later() -> None:
    model, losses = plain()
    calls = []

    def closure(copies: int) -> Tensor:
        calls.append(copies)
        if len(calls) == 7:  # the only one of the third step
            with torch.no_grad():
                model[0].weight.mul_(0.5)  # type: ignore[index]
        return losses(copies)

    optimizer = zoext.MeZO(model, probe="batched")
    for _ in range(2):
        optimizer.estimate(closure)
    with pytest.raises(BatchedProbeError, match=r"0.weight"):
        optimizer.estimate(closure)


def test_a_capacity_that_more_copies_exceed() -> None:
    """A pool whose second round has more probes than its first one, and a layer that then mixes copies."""

    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if len(x) > 3 * BATCH else x

    model, losses = plain(Mixes())
    optimizer = zoext.ZerothOrderOptimizer(
        model, direction=zoext.Gaussian(), estimator=zoext.GreedyPool(pool_size=6), probe="batched"
    )
    with pytest.raises(BatchedProbeError, match="copies of the batch"):
        optimizer.estimate(losses)


def test_sampled_tokens_are_those_of_a_single_copy() -> None:
    def make() -> tuple[nn.Module, Losses]:
        model = sequence()
        x = torch.randn(BATCH, WIDTH, dtype=torch.float64)

        def losses(copies: int) -> Tensor:
            logits = model(x.repeat(copies, 1))
            token = torch.multinomial(logits.softmax(1), 1)
            return zoext.mean_per_copy(logits.gather(1, token).squeeze(1), copies)

        return model, losses

    same(make)


def test_losses_of_other_kinds() -> None:
    model = sequence()
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        hits = zoext.MeZO(model, probe="batched").estimate(
            lambda copies: model(x.repeat(copies, 1)).view(copies, -1).sum(1) > 0
        )
    assert torch.isfinite(hits.coefficients).all()
    # AGZO runs a single copy first.
    zoext.AGZO(model, probe="batched").estimate(
        lambda copies: (
            model(x).square().mean()
            if copies == 1
            else zoext.mean_per_copy(model(x.repeat(copies, 1)).square().mean(1), copies)
        )
    )


def test_errors_of_memory_stay_themselves() -> None:
    model = nn.Sequential(nn.Embedding(5, WIDTH)).double()

    def closure(copies: int) -> Tensor:
        found = model(torch.arange(5))
        if found.dim() == 3:  # spread over the examples, in the second forward of the check
            raise torch.OutOfMemoryError("no memory")
        return found.sum().expand(copies)

    with pytest.raises(torch.OutOfMemoryError):
        zoext.MeZO(model, probe="batched").estimate(closure)
