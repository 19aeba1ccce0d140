"""Batched probes run a packed base once for all copies, with LoRA or side paths beside its layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import zoext
from support.packed_bases import losses, packed
from support.packings import PACKINGS
from support.side_paths import filled

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that pack

BASES = [*PACKINGS, "HQQ", "GGUF"]
DIRECTIONS = {
    "mezo": zoext.Gaussian(),
    "lozo": zoext.LowRank(rank=2),
    "agzo": zoext.ActivationSubspace(rank=2, balance="matched"),
}


def with_lora(base: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(base, config)


def with_side_paths(base: Any) -> Any:
    filled(zoext.attach_side_paths(base, 4, names=["q_proj", "v_proj"]))
    return base


def packed_layer(model: Any) -> nn.Module:
    (layer,) = (
        each
        for name, each in model.named_modules()
        if name.endswith(("layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj.base_layer"))
        and not isinstance(each, peft.tuners.lora.LoraLayer)
    )
    return layer


def frozen_bits(model: nn.Module) -> list[Tensor]:
    """Copies of the bytes of frozen weights."""
    tensors = (*model.parameters(), *model.buffers())
    return [part for each in tensors if not each.requires_grad for part in stored(each.detach())]


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor; one of a class of torchao or quanto stores several others."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, name))
    else:
        yield tensor.clone().flatten().view(torch.uint8)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapt", [with_lora, with_side_paths])
def test_losses_are_those_of_sequential_probes(adapt: Any, base: str, tmp_path: Path) -> None:
    model = adapt(packed(base, tmp_path))
    before = frozen_bits(model)
    calls: list[int] = []
    packed_layer(model).register_forward_hook(lambda *_: calls.append(1))
    for direction in DIRECTIONS.values():
        found: dict[str, list[Tensor]] = {"streamed": [], "batched": []}
        for probe, own in found.items():

            def closure(copies: int = 1, own: list[Tensor] = own, one: bool = probe == "streamed") -> Tensor:
                each = losses(model, copies)
                own.extend(each)
                return each[0] if one else each

            estimator = zoext.CentralDifference(samples=2)
            optimizer = zoext.ZerothOrderOptimizer(
                model, direction=direction, estimator=estimator, mu=0.1, lr=0, seed=3, probe=probe
            )
            for _ in range(3):  # the first two begin with forwards that check the copies
                own.clear()
                calls.clear()
                optimizer.estimate(closure)
            forwards = 1 if probe == "batched" else len(own)
            assert len(calls) == forwards
        one, other = (torch.stack(each[-4:]) for each in (found["batched"], found["streamed"]))
        # Copies change the order in which 16-bit and int8 products are summed.
        torch.testing.assert_close(one, other, rtol=1e-2, atol=0)
        assert len(set(one.tolist())) == 4
    assert all(torch.equal(one, other) for one, other in zip(frozen_bits(model), before, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_runs_on_side_paths_are_replayed(base: str, tmp_path: Path) -> None:
    model = with_side_paths(packed(base, tmp_path))
    path = tmp_path / "run.jsonl"
    before = frozen_bits(model)
    optimizer = zoext.LOZO(model, lr=1e-3, mu=1e-2, refresh_interval=2, probe="batched")
    with zoext.Trajectory(path, optimizer):
        for _ in range(3):
            optimizer.step(lambda copies: losses(model, copies))
    assert all(torch.equal(one, other) for one, other in zip(frozen_bits(model), before, strict=True))
    other = with_side_paths(packed(base, tmp_path))
    start = {name: each.clone() for name, each in other.named_parameters() if each.requires_grad}
    zoext.replay(other, path)
    trained = dict(model.named_parameters())
    assert len(start) == 4
    for name, each in other.named_parameters():
        if name in start:
            assert torch.equal(each, trained[name])
            assert not torch.equal(each, start[name])
