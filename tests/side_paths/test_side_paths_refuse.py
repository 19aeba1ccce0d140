"""Arguments that cannot be meant raise an error that names them, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zoext
from support.side_paths import model

CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rank": 0}, ValueError, "rank must be an integer of at least 1, not 0"),
    ({"rank": True}, ValueError, "rank must be an integer"),
    ({"seed": 2**64}, ValueError, "seed must fit into 64 bits"),
    (
        {"names": ["head", "q_proj"]},
        ValueError,
        "no linear layer is called 'q_proj'; there are first, head, packed",
    ),
    ({"names": ["ead"]}, ValueError, "no linear layer is called 'ead'"),
    ({"names": []}, ValueError, "names: there is no linear layer"),
]


@pytest.mark.parametrize(("options", "error", "message"), CASES)
def test_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    built = model()
    names = list(built.state_dict())
    with pytest.raises(error, match=message):
        zoext.attach_side_paths(built, **options)
    assert list(built.state_dict()) == names
    assert all(each.requires_grad for each in built.parameters())


def test_a_layer_has_one_path() -> None:
    built = model()
    zoext.attach_side_paths(built, names=["first"])
    with pytest.raises(ValueError, match="first has a side path already; call detach_side_paths"):
        zoext.attach_side_paths(built)
    zoext.attach_side_paths(built, names=["head", "packed"])
    trainable = [name for name, each in built.named_parameters() if each.requires_grad]
    assert trainable == [f"{name}.side_path.up.weight" for name in ("first", "packed", "head")]


def test_models() -> None:
    with pytest.raises(ValueError, match="there is no linear layer"):
        zoext.attach_side_paths(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="0 is on the meta device; load its weights"):
        zoext.attach_side_paths(nn.Sequential(nn.Linear(3, 2, device="meta")))
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match=r"out_proj: .* reads its weight without calling it"):
        zoext.attach_side_paths(attention, names=["out_proj"])
    with pytest.raises(TypeError, match="compiled"):
        zoext.attach_side_paths(torch.compile(model(), backend="eager"))


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["head"]))
    with pytest.raises(ValueError, match="adapters of PEFT"):
        zoext.attach_side_paths(adapted)


def test_names() -> None:
    def chosen(names: Any) -> list[str]:
        return list(
            zoext.attach_side_paths(nn.ModuleDict({"one": model(), "head": nn.Linear(2, 3)}), names=names)
        )

    assert chosen("head") == ["head"], "a full name is that of one layer"
    assert chosen(["first"]) == ["one.first"]
    assert chosen("*ead") == ["one.head", "head"]
    assert chosen(["one.packed", "one.*"]) == ["one.packed", "one.first", "one.head"]


def test_the_output_layer_of_transformers_is_left_out() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from support.peft_methods import llama

    built = llama()
    assert "lm_head" not in zoext.attach_side_paths(built)
    assert list(zoext.attach_side_paths(built, names=["lm_head"])) == ["lm_head"]
