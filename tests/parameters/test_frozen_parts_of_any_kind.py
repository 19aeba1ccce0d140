"""Frozen weights and buffers may be packed, wrapped or elsewhere: they stop no run, recording or replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import zoext

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")


class Packed(Tensor):
    """A wrapper without a storage of its own, as of torchao and quanto: int8 and a scale for each row."""

    values: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=scales.dtype, device=values.device
        )

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales

    @classmethod
    def of(cls, weight: Tensor) -> Packed:
        scales = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales)

    def unpacked(self) -> Tensor:
        return self.values.to(self.scales.dtype) * self.scales

    def untyped_storage(self) -> Any:
        raise RuntimeError("Attempted to access the data pointer on an invalid python storage.")

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scales)
        args, kwargs = tree_map(
            lambda each: each.unpacked() if isinstance(each, cls) else each, (args, kwargs or {})
        )
        return func(*args, **kwargs)


class Reluctant(nn.Parameter):
    """A parameter of a class of its own over plain bytes, as of bitsandbytes and GGUF."""

    state: Any = None


class PackedLinear(nn.Module):
    """Two 4-bit numbers in each byte, and a state beside them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.scale = weight.shape, weight.abs().max() / 7
        codes = (weight / self.scale).round().to(torch.int8).add(8).to(torch.uint8).flatten()
        self.weight = Reluctant((codes[::2] * 16 + codes[1::2]).unsqueeze(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.weight % 16, self.weight // 16
        codes = torch.cat((high, low), 1).flatten().to(x.dtype) - 8
        return nn.functional.linear(x, (codes * self.scale).view(self.shape))


def wrapped(base: nn.Linear) -> nn.Module:
    base.weight = nn.Parameter(Packed.of(base.weight.detach()), requires_grad=False)
    return base


class WithBuffers(nn.Module):
    """hqq keeps what it packed in buffers and in plain attributes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", Packed.of(weight))
        self.register_buffer("nothing", None)
        self.register_buffer("sparse", weight.to_sparse())
        self.register_buffer("quantized", torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8))
        self.register_buffer("far", torch.empty(3, device="meta"))
        self.register_buffer("eight", weight.to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed) + nn.functional.linear(x, self.eight.to(x.dtype))


class Offloaded(nn.Module):
    """On the meta device, with other tensors for each forward, as Accelerate offloads."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.kept = base.weight.detach().clone()
        self._leave()

    def _leave(self) -> None:
        self.base.weight = nn.Parameter(torch.empty_like(self.kept, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.base.weight = nn.Parameter(self.kept.clone(), requires_grad=False)
        result = self.base(x)
        self._leave()
        return result


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "a wrapper": wrapped,
    "bytes of a class of their own": lambda base: PackedLinear(base.weight.detach()),
    "buffers": lambda base: WithBuffers(base.weight.detach()),
    "offloaded": Offloaded,
}


class LoRA(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    bases = [nn.Linear(8, 8, bias=False).requires_grad_(False) for _ in range(2)]
    return nn.Sequential(*(LoRA(KINDS[kind](base)) for base in bases))


def loss_of(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 24).view(3, 8)
    return model(x).square().mean()


def moving(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad
    }


@pytest.mark.parametrize("recipe", [zoext.MeZO, zoext.AGZO, zoext.LOZO])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_recorded_continued_and_replayed(
    kind: str, recipe: Callable[..., zoext.ZerothOrderOptimizer], tmp_path: Path
) -> None:
    model = model_of(kind)
    before = moving(model)
    optimizer = recipe(model, lr=1e-2, mu=1e-2)
    with zoext.Trajectory(tmp_path / "run.jsonl", optimizer, frames=recipe is zoext.AGZO):
        for _ in range(3):
            optimizer.step(lambda: loss_of(model))
    after = moving(model)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    again = model_of(kind)
    replayed = zoext.replay(again, tmp_path / "run.jsonl")
    assert all(torch.equal(weight, after[name]) for name, weight in moving(again).items())
    optimizer.load_state_dict(optimizer.state_dict())
    for each, own in ((optimizer, model), (replayed, again)):
        each.step(lambda own=own: loss_of(own))
    assert all(torch.equal(weight, moving(again)[name]) for name, weight in moving(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_probes_agree(kind: str) -> None:
    slopes = []
    for probe in ("streamed", "inplace"):
        model = model_of(kind)
        optimizer = zoext.MeZO(model, mu=1e-2, probe=probe)
        slopes.append(float(optimizer.estimate(lambda model=model: loss_of(model)).coefficients))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)
    assert slopes[0] != 0


def test_a_wrapper_that_is_to_move_is_refused_by_name() -> None:
    model = model_of("a wrapper")
    model[1].base.weight = nn.Parameter(Packed.of(torch.ones(8, 8)), requires_grad=True)
    with pytest.raises(ValueError, match=r"1\.base\.weight is a Packed; only plain tensors .* freeze it"):
        zoext.MeZO(model)


def test_an_offloaded_weight_that_is_to_move_is_refused_with_what_keeps_it() -> None:
    model = model_of("offloaded")
    model[0].base.base.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"0\.base\.base\.weight.*remove_hook_from_module.*would lose its values"
    ):
        zoext.MeZO(model)


def test_a_state_is_loaded_where_weights_are_even_if_the_first_is_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].weight = nn.Parameter(torch.empty(3, 3, device="meta"), requires_grad=False)
    optimizer = zoext.AdaMeZO(model, lr=1e-2)
    for _ in range(2):
        optimizer.step(lambda: model[1](torch.ones(2, 3)).square().mean())
        optimizer.load_state_dict(optimizer.state_dict())
        state = tree_leaves(optimizer.param_groups[0]["update_state"])
        tensors = [value for value in state if isinstance(value, Tensor)]
        assert tensors
        assert all(value.device == model[1].weight.device for value in tensors)


@pytest.mark.parametrize("named", [True, False])
def test_groups_are_added_later_with_names_or_without(named: bool) -> None:
    """Noise keys, and so the bits, are the same."""
    weights = []
    for is_late in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        parts = [list(part.named_parameters() if named else part.parameters()) for part in model]
        if is_late:
            optimizer = zoext.MeZO(parts[0], lr=1e-2, mu=1e-2)
            optimizer.add_param_group({"params": parts[1]})
        else:
            optimizer = zoext.MeZO([{"params": part} for part in parts], lr=1e-2, mu=1e-2)
        optimizer.step(lambda model=model: model(torch.ones(2, 3)).square().mean())
        weights.append([weight.detach() for weight in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_an_unnamed_group_of_a_module() -> None:
    """The optimizer of a module has names; a group that is added to it may have none."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = zoext.MeZO(model, lr=1e-2, mu=1e-2, probe="inplace")
    optimizer.add_param_group({"params": list(other.parameters())})
    before = other.weight.detach().clone()
    optimizer.step(lambda: (model(torch.ones(2, 3)) + other(torch.ones(2, 3))).square().mean())
    assert not torch.equal(other.weight, before)
