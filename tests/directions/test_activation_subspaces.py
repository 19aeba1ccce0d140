"""AGZO's directions: which weights they move, in which subspace, and what they cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from zoext import ops

SEED = 31


def subspace(change: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of the row space of a matrix that should have rank ``rank``, [rank, columns]."""
    _, values, rows = torch.linalg.svd(change.double(), full_matrices=False)
    assert (values[rank:] <= 1e-5 * values[0]).all()
    assert (values[:rank] > 1e-4 * values[0]).all()
    return rows[:rank]


def leading(activations: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(activations.double(), full_matrices=False)[2][:rank]


def angle(a: Tensor, b: Tensor) -> float:
    """The sine of the largest principal angle between two row spaces."""
    return (a - a @ b.T @ b).norm(2).item()


def displacement(
    model: nn.Module, closure: Callable[[], Any], **options: Any
) -> tuple[list[Tensor], zoext.Estimate]:
    """How far one step moves every parameter."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = zoext.AGZO(model, lr=1.0, mu=1e-2, seed=SEED, **options)
    optimizer.step(closure)
    assert optimizer.last_estimate is not None
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    return moved, optimizer.last_estimate


def activations(rows: int, width: int, decay: float = 3.0, seed: int = 0) -> Tensor:
    """Rows whose singular values fall by ``decay`` from one to the next, until 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0][:, : min(rows, width)]
    right = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][: min(rows, width)]
    values = decay ** -torch.arange(min(rows, width)).float()
    return left * values.clamp_min(1e-3) @ right * 10


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_a_linear_weight_moves_in_the_leading_subspace_of_its_input(rank: int, probe: str) -> None:
    torch.manual_seed(2)
    x = activations(20, 15).reshape(4, 5, 15)
    model = nn.Linear(15, 12).double()
    target = torch.randn(4, 5, 12).double()
    moved, estimate = displacement(
        model,
        lambda: (model(x.double()) - target).square().mean(),
        rank=rank,
        power_iterations=5,
        probe=probe,
    )
    assert angle(subspace(moved[0], rank), leading(x.reshape(20, 15), rank)) < 1e-3
    assert estimate.forwards == 2
    # The bias has a dense direction.
    z = zoext.noise.normal(12, seed=zoext.noise.step_seed(SEED, 0), key=1).double()
    assert torch.allclose(moved[1], -estimate.coefficients.double() * z, rtol=1e-4)


def test_gpt2s_transposed_layers_are_linear_layers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(2)
    x = activations(20, 9).reshape(4, 5, 9).double()
    usual, transposed = nn.Linear(9, 6).double(), conv1d(6, 9).double()
    with torch.no_grad():
        usual.weight.copy_(transposed.weight.T)
        usual.bias.copy_(transposed.bias)
    a, _ = displacement(usual, lambda: usual(x).square().mean(), rank=2)
    b, _ = displacement(transposed, lambda: transposed(x).square().mean(), rank=2)
    assert torch.allclose(a[0], b[0].T, rtol=1e-5, atol=1e-12)
    assert torch.allclose(a[1], b[1], rtol=1e-5, atol=1e-12)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.table(tokens)))


def test_a_head_tied_to_a_table_is_dense() -> None:
    torch.manual_seed(2)
    model, tokens = Tied(), torch.arange(12).reshape(3, 4)
    moved, _ = displacement(model, lambda: model(tokens).square().mean())
    assert torch.linalg.matrix_rank(moved[0]) == 6
    assert torch.linalg.matrix_rank(moved[1], rtol=1e-3) == 1


def test_layers_fed_by_one_tensor_share_its_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*args: Any, original: Any = ops.power_iteration, **options: Any) -> Any:
        calls.append(args[0].shape)
        return original(*args, **options)

    monkeypatch.setattr(ops, "power_iteration", counting)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.out = nn.Linear(5, 5), nn.Linear(5, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.key(x) * self.query(x)[..., :4])

    model, x = Attention(), torch.randn(2, 3, 5)
    moved, _ = displacement(model, lambda: model(x).square().mean())
    assert calls == [(2, 3, 5), (2, 3, 4)]
    assert angle(subspace(moved[0], 1), subspace(moved[2], 1)) < 1e-4

    # An input that was changed in between is another input.
    class Changing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            first = self.query(x)
            return self.out(self.key(x.square_()) * first[..., :4])

    calls.clear()
    other = Changing()
    displacement(other, lambda: other(x).square().mean())
    assert calls == [(2, 3, 5), (2, 3, 5), (2, 3, 4)]


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("by_name", [True, False])
def test_padding_does_not_count(by_name: bool) -> None:
    torch.manual_seed(2)
    text = activations(12, 8).reshape(3, 4, 8)
    padding = 100 * torch.randn(3, 2, 8)
    x = torch.cat([text, padding], 1)
    mask = torch.tensor([1, 1, 1, 1, 0, 0]).expand(3, 6)
    model = Padded()

    def loss() -> Tensor:
        out = model(x, attention_mask=mask) if by_name else model(x, mask)
        return out[:, :4].square().mean()

    moved, _ = displacement(model, loss, rank=2, power_iterations=5)
    assert angle(subspace(moved[0], 2), leading(text.reshape(12, 8), 2)) < 1e-3
    counted, _ = displacement(model, loss, rank=2, power_iterations=5, mask=None)
    assert angle(subspace(counted[0], 2), leading(text.reshape(12, 8), 2)) > 0.1


def test_a_mask_that_no_forward_takes_is_refused() -> None:
    with pytest.raises(
        ValueError, match="mask must be an argument of the module's forward, not 'padding'; it has x"
    ):
        zoext.AGZO(Padded(), mask="padding")


class Transposing(Padded):
    """Runs its layer on [positions, batch, d], as nn.Transformer does by default."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x.transpose(0, 1).contiguous()).transpose(0, 1)


class Flattening(Padded):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(("kind", "masked"), [(Transposing, False), (Flattening, True)])
def test_a_mask_is_used_where_it_fits_the_rows(kind: type[Padded], masked: bool) -> None:
    """Elsewhere it would leave out other positions than the padding."""
    torch.manual_seed(2)
    text, padding = activations(12, 8).reshape(3, 4, 8), 100 * torch.randn(3, 2, 8)
    x = torch.cat([text, padding], 1)
    mask = torch.tensor([1, 1, 1, 1, 0, 0]).expand(3, 6)
    model = kind()
    moved, _ = displacement(model, lambda: model(x, attention_mask=mask).sum(), rank=2, power_iterations=5)
    rows = text.reshape(12, 8) if masked else x.reshape(18, 8)
    assert angle(subspace(moved[0], 2), leading(rows, 2)) < 1e-3


def test_attention_reads_its_output_weight_and_never_calls_it() -> None:
    """So that weight is dense, and everything else of the layer has its subspace."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    moved, _ = displacement(model, lambda: model(x).square().sum(), probe="inplace")
    ranks = {
        name: int(torch.linalg.matrix_rank(change, rtol=1e-2))
        for (name, _), change in zip(model.named_parameters(), moved, strict=True)
        if change.dim() == 2
    }
    assert ranks["self_attn.out_proj.weight"] == 8
    assert ranks["linear1.weight"] == 1


def test_micro_batches_after_activations_that_were_not_finite_move_nothing() -> None:
    model = nn.Linear(4, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    bad, good = torch.full((2, 4), float("inf")), torch.ones(2, 4)
    for update in (zoext.SGD(), zoext.AdamReplay()):
        optimizer = zoext.ZerothOrderOptimizer(
            model,
            direction=zoext.ActivationSubspace(),
            estimator=zoext.ForwardDifference(),
            update=update,
            lr=1.0,
            nonfinite="skip",
        )
        for x in (bad, good):
            optimizer.estimate(lambda x=x: 0 * torch.nan_to_num(model(x)).sum() + model(good).sum())
        optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_layer_that_runs_twice_gets_the_subspace_of_all_its_inputs() -> None:
    """Two inputs of rank one, along different axes: the basis of rank two spans both."""
    model = nn.Linear(6, 6, bias=False)
    first, second = torch.zeros(4, 6), torch.zeros(7, 6)
    first[:, 1], second[:, 4] = 3.0, -2.0
    moved, _ = displacement(model, lambda: model(first).sum() + model(second).sum(), rank=2)
    assert angle(subspace(moved[0], 2), torch.eye(6).double()[[1, 4]]) < 1e-5


@pytest.mark.parametrize("estimator", [zoext.CentralDifference(), zoext.GuidingVector(), zoext.GreedyPool()])
def test_estimators_without_a_centre_pay_for_one_forward_more(estimator: zoext.Estimator) -> None:
    counts = []
    for direction in (zoext.Gaussian(), zoext.ActivationSubspace()):
        model = nn.Linear(4, 3)
        calls = []
        optimizer = zoext.ZerothOrderOptimizer(model, direction=direction, estimator=estimator)
        optimizer.step(lambda model=model, calls=calls: calls.append(1) or model(torch.ones(2, 4)).sum())
        assert optimizer.last_estimate is not None
        assert optimizer.last_estimate.forwards == len(calls)
        counts.append(len(calls))
    assert counts[1] == counts[0] + 1


def test_balance() -> None:
    """matched: every parameter's direction has about the norm of MeZO's; still: others do not move."""
    torch.manual_seed(2)
    start = nn.Sequential(nn.Linear(64, 400), nn.LayerNorm(400))
    x = torch.randn(5, 64)
    ratios = {}
    for balance in ("paper", "matched", "freeze"):
        model = copy.deepcopy(start)
        moved, estimate = displacement(
            model, lambda model=model: model(x).square().sum(), balance=balance, rank=2
        )
        ratios[balance] = [
            (change.norm() / abs(estimate.coefficients) / change.numel() ** 0.5).item() for change in moved
        ]
    # Norms of a thousand normals: within 10 % of their expectation but for one case in 10^5.
    assert ratios["paper"] == pytest.approx([(2 / 64) ** 0.5, 1, 1, 1], rel=0.1)
    assert ratios["matched"] == pytest.approx([1, 1, 1, 1], rel=0.1)
    assert ratios["freeze"] == pytest.approx([(2 / 64) ** 0.5, 0, 0, 0], rel=0.1)


def test_micro_batches_share_the_directions_of_the_first() -> None:
    torch.manual_seed(2)
    parts = [activations(12, 8, seed=i).double() for i in range(2)]
    model = nn.Linear(8, 5).double()
    optimizer = zoext.AGZO(model, lr=1.0, mu=1e-3, seed=SEED)
    before = model.weight.detach().clone()
    estimates = [optimizer.estimate(lambda x=x: model(x).square().mean()) for x in parts]
    assert [estimate.forwards for estimate in estimates] == [2, 2]
    optimizer.step()
    change = model.weight.detach() - before
    assert angle(subspace(change, 1), leading(parts[0], 1)) < 0.05
    assert optimizer.last_estimate is not None
    mean = sum(estimate.coefficients for estimate in estimates) / 2
    assert torch.equal(optimizer.last_estimate.coefficients, mean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_activations_that_are_not_finite_move_nothing(bad: float, probe: str) -> None:
    """Also where the loss itself is finite."""
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    x = torch.ones(2, 4)
    x[1, 2] = bad
    optimizer = zoext.AGZO(model, lr=1.0, probe=probe, nonfinite="skip", weight_decay=0.5)
    optimizer.step(lambda: model(x)[0].sum())
    assert optimizer.nonfinite_steps == 1
    assert (model.weight - before).abs().max() <= (1e-6 if probe == "inplace" else 0)
    optimizer = zoext.AGZO(model, lr=1.0, probe=probe)
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step(lambda: model(x)[0].sum())


@pytest.mark.parametrize("rank", [1, 3])
def test_inputs_of_one_token_and_of_none_but_zeros(rank: int) -> None:
    model = nn.Linear(6, 5)
    one = torch.tensor([[1.0, -2.0, 0.0, 3.0, 0.5, 1.0]])
    moved, _ = displacement(model, lambda: model(one).square().sum(), rank=rank)
    assert angle(subspace(moved[0], 1), leading(one, 1)) < 1e-4
    moved, estimate = displacement(model, lambda: model(0 * one).square().sum(), rank=rank)
    assert estimate.finite
    assert not moved[0].any()
    assert moved[1].any()


def test_no_hook_and_no_activation_outlives_a_step() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    x = torch.ones(2, 4)
    optimizer = zoext.AGZO(model)
    optimizer.step(lambda: model(x).sum())
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: model(x).sum() / 0 if False else 1 / 0)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("balance", ["paper", "matched", "freeze"])
def test_the_rank_of_a_narrow_layer_is_its_width(balance: str) -> None:
    """It moves as with the rank of its width; the basis then spans all of its input."""
    ends = []
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    for rank in (4, 6):
        torch.manual_seed(0)
        model = nn.Linear(4, 30)
        told = pytest.warns(UserWarning, match=r"rank=6 .* weight \(4\)$") if rank > 4 else nullcontext()
        with told:
            optimizer = zoext.AGZO(model, rank=rank, balance=balance, lr=1e-2)
        for _ in range(3):
            optimizer.step(lambda model=model: model(x).square().mean())
        ends.append(model.weight.detach())
    assert torch.equal(*ends)


def test_what_cannot_be_done_is_refused_before_anything_moves() -> None:
    model = nn.Sequential(nn.Linear(4, 30), nn.Linear(30, 2))
    with pytest.raises(ValueError, match="linear layer whose weight requires grad"):
        zoext.AGZO(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))
    with pytest.raises(ValueError, match=r"needs the nn\.Module"):
        zoext.AGZO(list(model.parameters()))
    zoext.AGZO([{"params": model.parameters()}], probe=zoext.StreamedProbe(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, not 0"),
        ({"rank": 1.5}, "rank must be"),
        ({"power_iterations": -1}, "power_iterations must be an integer of at least 0, not -1"),
        ({"balance": "equal"}, "balance must be one of paper, matched, freeze, not 'equal'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoext.ActivationSubspace(**options)
