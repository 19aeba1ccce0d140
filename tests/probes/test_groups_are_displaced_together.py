"""A streamed probe displaces small modules together, which changes nothing but the number of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.batched_models import CAUSAL, PLAIN, problem
from support.oracle import bits
from zoext.probes import _groups as groups

DIRECTIONS = {
    "gaussian": zoext.Gaussian(),
    "lozo": zoext.LowRank(rank=2),
    "agzo": zoext.ActivationSubspace(rank=2, balance="matched"),
}
STEPS = 9  # groups are found in steps 2, 4 and 8


class Beside(nn.Module):
    """A model, and a layer larger than all of it, so that its modules fit into the memory of one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        torch.manual_seed(1)
        self.large = nn.Linear(100, 90).to(next(model.parameters()).dtype)

    def forward(self) -> Tensor:
        return self.large(torch.ones(1, 100, dtype=self.large.weight.dtype)).square().mean()


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 8)
        self.down = nn.Linear(8, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(self.up(self.norm(h)).tanh())


class Blocks(nn.Module):
    """Blocks that can be grouped, beside a large layer."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.large = nn.Linear(40, 6)
        self.blocks = nn.ModuleList(blocks or (Block(), Block()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.large(x)
        for block in self.blocks:
            h = block(h)
        return h.square().mean()


X = torch.linspace(-1, 1, 120).view(3, 40)


def found(optimizer: zoext.ZerothOrderOptimizer) -> list[nn.Module]:
    """The containers of the groups of an optimizer's probe."""
    return [group.container for group in optimizer.engine.probe._swap._groups]  # type: ignore[attr-defined]


def run(
    model: nn.Module,
    closure: Callable[[], Tensor],
    direction: str = "gaussian",
    steps: int = STEPS,
    **options: Any,
) -> tuple[list[float], zoext.ZerothOrderOptimizer]:
    options = {"lr": 1e-4, "mu": 1e-2, "seed": 7, **options}
    optimizer = zoext.ZerothOrderOptimizer(
        model, direction=DIRECTIONS[direction], probe="streamed", weight_decay=0.1, **options
    )
    torch.manual_seed(5)
    return [float(optimizer.step(closure)) for _ in range(steps)], optimizer


def assert_equal_without_groups(
    make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]],
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> None:
    torch.manual_seed(3)
    model, closure = make()
    losses, optimizer = run(model, closure, **options)
    assert len(found(optimizer)) == count
    monkeypatch.setattr(groups, "MOST", {"cpu": 0})
    torch.manual_seed(3)
    other, closure = make()
    expected, without = run(other, closure, **options)
    assert not found(without)
    assert losses == expected
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(bits(one), bits(two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [*PLAIN, *CAUSAL])
def test_bits_are_those_of_single_modules(
    name: str, direction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"parents": 1, "mixed": 0, "positions first": 0, "tokens": 1}

    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        given = problem(name, dtype)
        model = Beside(given.model)
        return model, lambda: given.losses(1)[0] + model()

    assert_equal_without_groups(make, counts.get(name, 2), monkeypatch, direction=direction)


def test_a_group_takes_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Blocks()
    _, optimizer = run(model, lambda: model(X))
    assert found(optimizer) == list(model.blocks)[::-1]
    written: list[int] = []
    real = zoext.Gaussian.copy_

    def counted(self: Any, out: Any, *arguments: Any) -> None:
        written.append(len(out))
        real(self, out, *arguments)

    monkeypatch.setattr(zoext.Gaussian, "copy_", counted)
    optimizer.step(lambda: model(X))
    assert written == 2 * [2, 6, 6]


def test_groups_need_no_more_memory() -> None:
    model = Blocks()
    _, optimizer = run(model, lambda: model(X), steps=1)
    before = [memory.numel() for memory in optimizer.engine.probe._swap.memory]  # type: ignore[attr-defined]
    for _ in range(STEPS):
        optimizer.step(lambda: model(X))
    assert found(optimizer)
    assert [memory.numel() for memory in optimizer.engine.probe._swap.memory] == before  # type: ignore[attr-defined]


def test_a_member_that_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while its container does not run, and before it in the same closure."""

    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = Blocks()
        block = model.blocks[0]

        def closure() -> Tensor:
            return model(X) + block.up(torch.ones(6)).square().mean() + block.norm(torch.ones(6)).sum()

        return model, closure

    assert_equal_without_groups(make, 2, monkeypatch)


class Skipping(Block):
    """Runs one of its layers in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def forward(self, h: Tensor) -> Tensor:
        self.forwards += 1
        return h + (self.down(self.up(h)) if self.forwards % 3 else self.norm(h))


def test_layers_that_do_not_always_run_are_in_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = Blocks(Block(), Skipping())
        return model, lambda: model(X)

    assert_equal_without_groups(make, 1, monkeypatch)


class Reading(Block):
    """Reads a weight of a layer itself."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) @ self.down.weight


def test_a_container_that_reads_weights_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = Blocks(Reading())
        return model, lambda: model(X)

    assert_equal_without_groups(make, 1, monkeypatch)


class Normalized(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)


def test_members_that_write_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = Blocks(Normalized(), Block()).train()
        return model, lambda: model(X)

    assert_equal_without_groups(make, 2, monkeypatch)


def test_closures_that_differentiate(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = Blocks()

        def closure() -> Tensor:
            with torch.enable_grad():
                x = X.clone().requires_grad_()
                (slope,) = torch.autograd.grad(model(x) + model(2 * x), x)
            return slope.square().sum()

        return model, closure

    assert_equal_without_groups(make, 2, monkeypatch)


class Energy(nn.Sequential):
    """Enables gradients itself, and returns before they are computed."""

    @torch.enable_grad()
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).square().sum()


class Force(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Conv1d(4, 64, 3)
        self.energy = Energy(nn.Conv1d(64, 2, 1), nn.Tanh(), nn.Conv1d(2, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.large(x).requires_grad_()
        energy = self.energy(h)
        with torch.enable_grad():
            return torch.autograd.grad(energy, h)[0].square().mean()


def test_containers_that_enable_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = Force()
        return model, lambda: model(torch.ones(2, 4, 9))

    assert_equal_without_groups(make, 1, monkeypatch)


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self) -> Tensor:
        return self.weight[:6]


class Collecting(Block):
    """Puts what a layer returns, a view of its weight, outside of the container, or writes to it."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.view, self.writes = Viewing(), writes

    def forward(self, h: Tensor, found: list[Tensor] | None = None) -> Tensor:
        view = self.view()
        if self.writes:
            view.mul_(2)
        if found is not None:
            found.append(view)
        return super().forward(h + view + self.view())


@pytest.mark.parametrize("writes", [False, True])
def test_members_that_return_views_of_their_weights(writes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = Blocks(Collecting(writes), Block())

        def closure() -> Tensor:
            found: list[Tensor] = []
            return model.blocks[1](model.blocks[0](model.large(X), found)).square().mean() + found[0].sum()

        return model, closure

    assert_equal_without_groups(make, 2, monkeypatch)


class Around(Blocks):
    """Has a weight of its own, which is displaced while the blocks run."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(6, 50))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.own.square().mean()


def test_groups_within_a_module_with_weights_need_no_more_memory() -> None:
    memory = []
    for most in (2**20, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(groups, "MOST", {"cpu": most})
            model = Around()
            _, optimizer = run(model, lambda model=model: model(X))  # type: ignore[misc]
        memory.append(sum(map(len, optimizer.engine.probe._swap.memory)))  # type: ignore[attr-defined]
    assert memory[0] == memory[1]


def test_kinds_that_change_are_not_kept_forever() -> None:
    """AGZO's directions are zero for layers that did not run."""
    model = Blocks(*(Block() for _ in range(5)))
    optimizer = zoext.AGZO(model, lr=1e-4, seed=1, probe="streamed")
    for step in range(32):
        used = [block for number, block in enumerate(model.blocks) if step >> number & 1]

        def closure(used: list[nn.Module] = used) -> Tensor:
            h = model.large(X)
            for block in used:
                h = block(h)
            return h.square().mean()

        optimizer.step(closure)
    kept = [len(parameters.made) for parameters in optimizer.engine.groups]
    assert 1 < max(kept) <= 16


def test_several_parameter_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = Blocks()
        return model, lambda: model(X)

    losses = []
    for most in (2**20, 0):
        monkeypatch.setattr(groups, "MOST", {"cpu": most})
        model, closure = make()
        vectors = [p for p in model.parameters() if p.dim() == 1]
        matrices = [p for p in model.parameters() if p.dim() == 2]
        optimizer = zoext.LOZO(
            [{"params": vectors, "lr": 1e-1}, {"params": matrices, "mu": 1e-2}],
            lr=1e-2,
            seed=3,
            probe=zoext.StreamedProbe(model),
        )
        losses.append([float(optimizer.step(closure)) for _ in range(STEPS)])
        assert len(found(optimizer)) == (2 if most else 0)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("where", ["norm", "down", "container"])
def test_an_error_restores_theta(where: str) -> None:
    model = Blocks()
    _, optimizer = run(model, lambda: model(X), steps=3)
    assert found(optimizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    block = model.blocks[1]
    part = block if where == "container" else getattr(block, where)

    def fail(*_: Any) -> None:
        raise ArithmeticError

    handle = part.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        optimizer.step(lambda: model(X))
    handle.remove()
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(torch.equal(bits(before[key]), bits(now)) for key, now in model.state_dict().items())
    optimizer.step(lambda: model(X))


class Keeping(Block):
    kept: list[Tensor]

    def forward(self, h: Tensor) -> Tensor:
        self.kept = [self.down.weight.view(-1)] if getattr(self, "keeps", False) else []
        return super().forward(h)


def test_a_view_that_outlives_a_container_is_told() -> None:
    model = Blocks(Keeping())
    _, optimizer = run(model, lambda: model(X), steps=4)
    assert found(optimizer) == list(model.blocks)
    model.blocks[0].keeps = True  # type: ignore[assignment]
    with pytest.raises(zoext.StreamedProbeError, match="outlives the forward"):
        optimizer.step(lambda: model(X))
    model.blocks[0].keeps = False  # type: ignore[assignment]
    optimizer.step(lambda: model(X))


class Returning(Block):
    def forward(self, h: Tensor) -> Any:
        return {"h": super().forward(h), "weight": self.down.weight}


def test_what_a_container_returns_of_its_weights_is_cloned(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = Blocks(Returning(), Block())

        def closure() -> Tensor:
            given = model.blocks[0](model.large(X))
            return model.blocks[1](given["h"]).square().mean() + given["weight"].square().sum()

        return model, closure

    assert_equal_without_groups(make, 2, monkeypatch)


def test_replaced_modules_are_found_again() -> None:
    model = Blocks()
    _, optimizer = run(model, lambda: model(X), steps=3)
    model.blocks[1] = Block()
    optimizer = zoext.MeZO(model, probe=optimizer.engine.probe, lr=1e-2)
    for _ in range(6):
        optimizer.step(lambda: model(X))
    assert set(found(optimizer)) == set(model.blocks)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # dynamo's own import
def test_models_with_compiled_code_have_none() -> None:
    torch.compiler.reset()
    model = Blocks()
    compiled = torch.compile(model.blocks[0], backend="eager")

    def closure() -> Tensor:
        return model.blocks[1](compiled(model.large(X))).square().mean()

    _, optimizer = run(model, closure)
    assert not found(optimizer)


def test_frozen_and_attention_modules() -> None:
    """Embeddings are read by rows, and the fast paths of torch's attention look at their weights."""
    attention = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    model = Blocks(Block(), attention, Block())
    model.blocks[2].requires_grad_(False)
    _, optimizer = run(model, lambda: model(X))
    assert found(optimizer) == [model.blocks[0]]
