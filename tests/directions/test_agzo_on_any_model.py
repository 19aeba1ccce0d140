"""AGZO's directions where modules are unused, weights multiplied elsewhere, and experts in one parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoext
from support import oracle
from zoext._parameters.parameters import Parameters
from zoext._parameters.shards import Block
from zoext.directions._products import masks_of_groups
from zoext.ops import Rounding, Stream

SEED, LR, MU = 2**63 + 9, 0.5, 1e-2


class Stepped(nn.Module):
    """Runs ``body(model, x)``."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def moved(model: nn.Module, x: Tensor, *, steps: int = 1, **options: Any) -> dict[str, Tensor]:
    """How far one step moves each parameter."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = zoext.AGZO(model, **{"lr": LR, "mu": MU, "seed": SEED} | options)
    for _ in range(steps):
        optimizer.step(lambda: model(x).square().mean())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def rank_of(change: Tensor) -> int:
    values = torch.linalg.svdvals(change.double())
    return int((values > 1e-4 * values[0]).sum()) if values[0] > 0 else 0


def angle_to_leading(change: Tensor, rows: Tensor) -> float:
    """The sine of the angle between a direction of rank one and the leading one of the rows."""
    a = torch.linalg.svd(change.double(), full_matrices=False)[2][0]
    b = torch.linalg.svd(rows.double().flatten(0, -2), full_matrices=False)[2][0]
    return (a - (a @ b) * b).norm().item()


def tokens(count: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows with one leading direction."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(count, 1, generator=generator) * torch.randn(width, generator=generator)
    return (3 * strong + 0.1 * torch.randn(count, width, generator=generator)).to(dtype)


# --- Unused modules ----------------------------------------------------------------------------------


def routed(model: Any, x: Tensor) -> Tensor:
    """Tokens 0 to 2 go to expert 1, the others to expert 3."""
    return torch.cat((model.experts[1](x[:3]), model.experts[3](x[3:])))


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("balance", ["paper", "matched", "freeze"])
def test_idle_experts_have_zero_directions(probe: str, balance: str) -> None:
    torch.manual_seed(1)
    model = Stepped(routed, experts=nn.ModuleList(nn.Linear(5, 7) for _ in range(4))).double()
    before = model.experts[0].weight.detach().clone()
    x = tokens(7, 5)
    change = moved(model, x, probe=probe, balance=balance, power_iterations=5, weight_decay=0.25)
    for number, rows in ((1, x[:3]), (3, x[3:])):
        decayed = change[f"experts.{number}.weight"] + LR * 0.25 * (
            model.experts[number].weight.detach() - change[f"experts.{number}.weight"]
        )
        assert rank_of(decayed) == 1
        assert angle_to_leading(decayed, rows) < 1e-3
    for number in (0, 2):
        assert change[f"experts.{number}.weight"].any()
    torch.testing.assert_close(change["experts.0.weight"], -LR * 0.25 * before, rtol=1e-6, atol=0)


def test_experts_that_get_no_token_have_zero_directions() -> None:
    torch.manual_seed(1)
    body = lambda model, x: torch.cat((model.a(x), model.b(x[:0])))  # noqa: E731
    change = moved(Stepped(body, a=nn.Linear(5, 7), b=nn.Linear(5, 7)), tokens(4, 5).float())
    assert change["a.weight"].any()
    assert not change["b.weight"].any()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_weights_without_elements(probe: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "none": nn.Linear(0, 3), "nothing": nn.Linear(3, 0)})
    before = model["used"].weight.detach().clone()
    optimizer = zoext.AGZO(model, lr=1e-2, probe=probe)
    x = torch.randn(5, 4)

    def closure() -> torch.Tensor:
        hidden = model["used"](x) + model["none"](x[:, :0])
        return hidden.square().mean() + model["nothing"](hidden).sum()

    for _ in range(3):
        optimizer.step(closure)
    assert not torch.equal(model["used"].weight, before)


def test_a_step_may_leave_out_all_layers() -> None:
    torch.manual_seed(1)
    change = moved(
        Stepped(lambda model, x: x * model.scale, unused=nn.Linear(3, 3), scale=nn.Parameter(torch.ones(3))),
        torch.ones(2, 3),
    )
    assert change["scale"].any()
    assert not change["unused.weight"].any()


# --- Weights that are multiplied elsewhere -----------------------------------------------------------

ELSEWHERE = {
    "linear": lambda weight, x: F.linear(x, weight),
    "keywords": lambda weight, x: F.linear(input=x, weight=weight),
    "operator": lambda weight, x: torch.ops.aten.linear.default(x, weight),
    "transposed": lambda weight, x: x @ weight.T,
    "from the left": lambda weight, x: (weight @ x.T).T,  # as Mamba's dt_proj
    "addmm": lambda weight, x: torch.addmm(torch.ones(7, dtype=x.dtype), x, weight.t()),
    "batches": lambda weight, x: torch.bmm(x[:, None], weight.T.expand(len(x), -1, -1))[:, 0],
    "copied": lambda weight, x: x @ weight.clone().transpose(0, 1).contiguous(),
    "in parts": lambda weight, x: torch.cat([F.linear(x, part) for part in weight.chunk(3)], 1),
    "detached": lambda weight, x: F.linear(x, weight.detach().view(7, 5)),
    "twice": lambda weight, x: F.linear(x[:2], weight).sum() + F.linear(x[2:], weight).sum(),
    "also read": lambda weight, x: F.linear(x, weight).mean() + weight.square().mean(),
    "autocast": lambda weight, x: autocast(lambda: x.float() @ weight.float().t()),
    "checkpointed": lambda weight, x: checkpoint(lambda x: x @ weight.t(), x, use_reentrant=False),
    "compiled": lambda weight, x: torch.compile(lambda x: F.linear(x, weight), backend="eager")(x),
}


def autocast(run: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return run().double()


@pytest.mark.parametrize("how", ELSEWHERE)
def test_a_weight_multiplied_elsewhere_gets_the_subspace_of_what_it_is_multiplied_with(how: str) -> None:
    x = tokens(6, 5)
    ends = []
    for probe in ("streamed", "inplace"):
        torch.manual_seed(1)
        model = Stepped(
            lambda model, x: ELSEWHERE[how](model.layer.weight, x), layer=nn.Linear(5, 7)
        ).double()
        change = moved(model, x, probe=probe, power_iterations=5)["layer.weight"]
        assert rank_of(change) == 1
        assert angle_to_leading(change, x) < 1e-3
        ends.append(change)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_a_weight_multiplied_in_a_branch() -> None:
    """Of a higher-order operator, which leaves torch's modes while it calls its functions."""
    torch.manual_seed(1)
    x = tokens(6, 5)

    def body(model: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 1e9, lambda x: x @ x.T, lambda x: F.linear(x, model.layer.weight), (x,))

    model = Stepped(body, layer=nn.Linear(5, 6)).double()
    change = moved(model, x, probe="inplace", power_iterations=5)["layer.weight"]
    assert rank_of(change) == 1
    assert angle_to_leading(change, x) < 1e-3


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("direction", ["AGZO", "MeZO"])
def test_losses_of_derivatives_are_those_of_the_model(direction: str, probe: str) -> None:
    """Views and copies of a watched weight keep their graph."""
    torch.manual_seed(1)
    x = tokens(6, 5)

    def body(model: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ model.a.weight.t()) + torch.tanh(x @ model.a.weight.clone().t())
        return model.b(hidden * model.stack[1].sum())

    model = Stepped(
        body, a=nn.Linear(5, 4), b=nn.Linear(4, 2), stack=nn.Parameter(torch.randn(2, 4, 5))
    ).double()
    weights = [model.a.weight, model.b.weight, model.stack]
    losses = []

    def closure() -> Tensor:
        with torch.enable_grad():
            found = torch.autograd.grad(model(x).square().sum(), weights, allow_unused=True)
        loss = torch.stack([each.square().sum() for each in found if each is not None]).sum()
        losses.append((len([each for each in found if each is not None]), loss.detach()))
        return loss

    _, expected = closure(), losses.pop()
    optimizer = zoext.ZerothOrderOptimizer(
        model,
        direction=zoext.directions.ActivationSubspace() if direction == "AGZO" else None,
        estimator=zoext.ForwardDifference(samples=1),
        probe=probe,
    )
    optimizer.estimate(closure)
    assert expected[0] == 3
    assert expected in losses


def test_a_weight_of_transformers_conv1d_is_multiplied_elsewhere() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(1)
    x = tokens(6, 5)
    model = Stepped(lambda model, x: x @ model.layer.weight, layer=conv1d(7, 5)).double()
    change = moved(model, x, power_iterations=5)["layer.weight"]
    assert rank_of(change) == 1
    assert angle_to_leading(change.T, x) < 1e-3


OTHERWISE = {
    "a penalty": lambda weight, x: weight.square().mean() + x.mean(),
    "some columns": lambda weight, x: F.linear(x[:, :3], weight[:, :3]),
    "an index": lambda weight, x: weight[torch.tensor([1, 2])] * x[:2],
    "from the other side": lambda weight, x: torch.ones(2, 7, dtype=x.dtype) @ weight,
    "in torch.vmap": lambda weight, x: torch.vmap(lambda row: (weight @ row).sum())(x),
}


@pytest.mark.parametrize("how", OTHERWISE)
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_a_weight_read_in_other_ways_is_dense(how: str, probe: str) -> None:
    torch.manual_seed(1)
    body = lambda model, x: model.out(x).mean() + OTHERWISE[how](model.layer.weight, x).sum()  # noqa: E731
    model = Stepped(body, layer=nn.Linear(5, 7), out=nn.Linear(5, 2)).double()
    change = moved(model, tokens(6, 5), probe=probe)
    assert rank_of(change["layer.weight"]) == 5
    assert rank_of(change["out.weight"]) == 1


# --- Experts in one parameter ------------------------------------------------------------------------

ROUTES = torch.tensor([0, 0, 3, 3, 3, 4, 4])  # of the tokens; experts 1 and 2 get none
EXPERTS = 5


def looped(weight: Tensor, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), weight.shape[1])
    for expert in ROUTES.unique():
        out[expert == ROUTES] = F.linear(x[expert == ROUTES], weight[expert])
    return out


def iterated(weight: Tensor, x: Tensor) -> Tensor:
    parts = [F.linear(x[number == ROUTES], each) for number, each in enumerate(weight)]
    return torch.cat(parts)


def grouped(weight: Tensor, x: Tensor) -> Tensor:
    ends = torch.bincount(ROUTES, minlength=EXPERTS).cumsum(0).int()
    return torch.nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


STACKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loop": looped,
    "iteration": iterated,
    "gathered": lambda weight, x: torch.bmm(weight[ROUTES], x.unsqueeze(-1)).squeeze(-1),
    "index_select": lambda weight, x: torch.bmm(weight.index_select(0, ROUTES), x[:, :, None]),
}


@pytest.mark.parametrize("how", STACKED)
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_each_expert_moves_in_the_subspace_of_its_tokens(how: str, probe: str) -> None:
    torch.manual_seed(1)
    x = tokens(7, 3)
    model = Stepped(
        lambda model, x: STACKED[how](model.experts, x), experts=nn.Parameter(torch.randn(EXPERTS, 7, 3))
    ).double()
    change = moved(model, x, probe=probe, power_iterations=5)["experts"]
    for expert in range(EXPERTS):
        rows = x[expert == ROUTES]
        assert rank_of(change[expert]) == (1 if len(rows) else 0)
        if len(rows):
            assert angle_to_leading(change[expert], rows) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products(dtype: torch.dtype) -> None:
    """Dimensions that the operator takes; the same directions as those of a loop, but for their signs."""
    x, changes = tokens(7, 16, dtype=dtype), []
    for how in (looped, grouped):
        torch.manual_seed(1)
        experts = nn.Parameter(torch.randn(EXPERTS, 24, 16, dtype=dtype))
        model = Stepped(lambda model, x, how=how: how(model.experts, x), experts=experts)
        changes.append(moved(model, x, mu=0.5, lr=64.0, power_iterations=6)["experts"].float())
    for expert in range(EXPERTS):
        a, b = (change[expert].flatten() for change in changes)
        if expert in ROUTES:
            assert torch.cosine_similarity(a, b, dim=0).abs() > 0.98
        else:
            assert not a.any()
            assert not b.any()


@pytest.mark.parametrize("how", ["loop", "gathered", "batched"])
def test_experts_that_store_their_weights_transposed(how: str) -> None:
    x = tokens(7, 3)

    def body(model: Any, x: Tensor) -> Tensor:
        weight = model.experts
        if how == "loop":
            return torch.cat([x[number == ROUTES] @ each for number, each in enumerate(weight)])
        if how == "gathered":
            return torch.bmm(x[:, None], weight[ROUTES])
        return torch.bmm(torch.stack([x * (number == ROUTES)[:, None] for number in range(EXPERTS)]), weight)

    torch.manual_seed(1)
    model = Stepped(body, experts=nn.Parameter(torch.randn(EXPERTS, 3, 7))).double()
    change = moved(model, x, power_iterations=5)["experts"]
    for expert in range(EXPERTS):
        rows = x[expert == ROUTES]
        assert rank_of(change[expert]) == (1 if len(rows) else 0)
        if len(rows):
            assert angle_to_leading(change[expert].T, rows) < 1e-3


@pytest.mark.parametrize("how", ["flattened", "a row of each"])
def test_products_that_mix_the_matrices_of_a_stack_are_dense(how: str) -> None:
    """Such a view has two dimensions, like one of a single matrix."""
    torch.manual_seed(1)
    model = Stepped(
        lambda model, x: F.linear(
            x, model.experts.flatten(0, 1) if how == "flattened" else model.experts[:, 0]
        ),
        experts=nn.Parameter(torch.randn(4, 6, 3)),
        unused=nn.Linear(3, 2),
    ).double()
    change = moved(model, tokens(7, 3))["experts"]
    assert [rank_of(each) for each in change] == [3, 3, 3, 3]


def test_parameters_of_three_dimensions_that_are_no_stacks_are_dense() -> None:
    torch.manual_seed(1)
    model = Stepped(
        lambda model, x: model.out(x + model.positions),
        positions=nn.Parameter(torch.randn(1, 7, 3)),
        out=nn.Linear(3, 2),
    ).double()
    change = moved(model, tokens(7, 3))
    assert rank_of(change["positions"][0]) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_moves_by_the_oracles_factors(dtype: torch.dtype, transposed: bool) -> None:
    """``R A^T`` of each expert, with the entries of R numbered throughout the stack."""
    torch.manual_seed(1)
    experts, rows, width, rank = 3, 7, 5, 2
    shape = (experts, width, rows) if transposed else (experts, rows, width)
    stack = nn.Parameter(torch.randn(shape).to(dtype))
    other = nn.Parameter(torch.randn(2))
    model = nn.ParameterDict({"other": other, "stack": stack})
    optimizer = zoext.ZerothOrderOptimizer(model, precision="nearest", probe="inplace")
    (group,) = optimizer.engine.look()
    given = torch.randn(experts, rank, width)
    given[1] = 0
    frame = zoext.directions.Frame(**{"left" if transposed else "right": {1: given}})
    seeds, coefficients = [SEED - 2**64, 17], [0.5, -0.25]
    terms = zoext.directions.Terms(torch.tensor(seeds), torch.tensor(coefficients), frame)
    expected = stack.detach().double().numpy().copy()
    at = np.arange(experts * rank * rows, dtype=np.uint64)
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        drawn = (
            oracle.normals(seed, 1, at, Stream.LEFT_FACTOR).reshape(experts, rank, rows).astype(np.float64)
        )
        for expert in range(experts):
            product = drawn[expert].T @ given[expert].double().numpy()
            expected[expert] += coefficient * (product.T if transposed else product)
    direction = zoext.ActivationSubspace(rank=rank)
    out = [torch.empty_like(tensor) for tensor in group.tensors]
    with torch.no_grad():
        direction.copy_(out, group, terms)
        direction.axpy_(group, [terms])
    position = group.keys.index(1)
    assert torch.equal(out[position], group.tensors[position])
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(stack.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_a_stack_moves_as_in_the_whole(dtype: torch.dtype, transposed: bool) -> None:
    """As a rank of a sharded model holds it; with the bits of stochastic rounding."""
    torch.manual_seed(1)
    shape, rank = (5, 6, 4), 2
    start = torch.randn(shape).to(dtype)
    frame = zoext.directions.Frame(
        **{"left" if transposed else "right": {3: torch.randn(5, rank, shape[1 if transposed else 2])}}
    )
    terms = zoext.directions.Terms(torch.tensor([3, 4]), torch.tensor([0.5, 2.0]), frame)
    direction = zoext.ActivationSubspace(rank=rank)

    def moved_part(*cut: slice) -> Tensor:
        offsets = [each.start or 0 for each in cut]
        part = start[cut].clone(memory_format=torch.contiguous_format)
        block = Block.of_shard(shape, offsets, part.shape)
        group = Parameters((part,), (3,), (block,), ("stack",), (0,), (part,), rounding=Rounding.STOCHASTIC)
        direction.axpy_(group, [terms], torch.tensor(0.1))
        return part

    everything = slice(None)
    whole = moved_part(everything, everything, everything)
    for cut in (
        (slice(1, 4), everything, everything),
        (everything, slice(2, 5), everything),
        (everything, everything, slice(1, 3)),
        (slice(2, 4), slice(1, 4), everything),
        (slice(2, 5), everything, slice(2, 4)),
    ):
        assert torch.equal(moved_part(*cut), whole[cut])


def test_adapters_of_unused_weights_are_zero_and_stacks_have_none() -> None:
    torch.manual_seed(1)
    x = tokens(7, 5)
    experts = nn.ModuleList(nn.Linear(5, 7, bias=False) for _ in range(4))
    model = Stepped(routed, experts=experts, stack=nn.Parameter(torch.randn(2, 5, 5))).double()
    model.body = lambda model, x: routed(model, x) + x.sum() * 0
    for uses_stack in (False, True):
        if uses_stack:
            model.body = lambda model, x: routed(model, x @ model.stack[1])
        optimizer = zoext.AGZO(model, lr=LR, mu=MU, seed=SEED)
        pending = optimizer.ask()
        with pending.displaced(0):
            loss = model(x).square().mean()
        pending = optimizer.tell([loss])
        assert pending is not None
        if uses_stack:
            with pytest.raises(ValueError, match="stack is a stack of matrices with factors each; freeze it"):
                pending.adapter(0)
        else:
            adapters = pending.adapter(0)
            for number in range(4):
                factors = adapters[f"experts.{number}.weight"]
                assert (factors.B @ factors.A).any() == (number in (1, 3))


def test_masks_select_the_rows_of_groups() -> None:
    """As CUDA needs them, which cannot select rows without waiting."""
    ends = [0, 3, 3, 7]
    masks = masks_of_groups(torch.tensor(ends, dtype=torch.int32), 9)
    rows = torch.arange(9)
    assert [rows[mask].tolist() for mask in masks] == [[], [0, 1, 2], [], [3, 4, 5, 6]]
