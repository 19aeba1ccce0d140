"""What a batch or a later change adds to the loss of the model is followed or refused, never left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import zoext
from support.peft_methods import quiet
from support.tiny_language_models import VOCABULARY, ragged, tiny
from zoext.losses import CompactLossError


def full(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        loss: Tensor = model(**batch).loss
    return loss


def shifted(examples: int = 3, length: int = 9) -> Tensor:
    """Labels where they are predicted, which are not those of ``ragged`` one place to the left."""
    labels = ragged(examples, length)["labels"].flip(1).contiguous()
    labels[:, 2] = 5
    return labels


@pytest.mark.parametrize("name", ["Llama", "Gemma 2, capped", "Granite, divided", "OPT", "GPT-2", "Mixtral"])
def test_shifted_labels_are_those_of_the_model(name: str) -> None:
    model, labels = tiny(name, scale=3.0), shifted()
    batch = {**ragged(), "shift_labels": labels}
    loss = zoext.CompactLoss(model, chunk=4)
    with torch.no_grad():
        got, copies = loss(batch), loss(zoext.repeat(batch, 2), copies=2)
        torch.testing.assert_close(loss({**batch, "shift_labels": None}), full(model, ragged()))
        tokens = loss.per_token(batch)
    want = full(model, batch)
    assert abs(float(want - full(model, ragged()))) > 1e-3
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(copies, want.expand(2))
    assert torch.equal(tokens != 0, labels != -100)


def test_shifted_labels_with_a_number_of_items() -> None:
    model = tiny("Llama")
    batch = {**ragged(), "shift_labels": shifted(), "num_items_in_batch": 7}
    with torch.no_grad():
        torch.testing.assert_close(zoext.CompactLoss(model, rows=27)(batch), full(model, batch))


@pytest.mark.parametrize("name", ["BERT", "T5"])
def test_shifted_labels_are_refused_where_the_model_takes_none(name: str) -> None:
    with torch.no_grad(), pytest.raises(CompactLossError, match=r"batch\['shift_labels'\]: the loss of this"):
        zoext.CompactLoss(tiny(name))({**ragged(), "shift_labels": shifted()})


def test_other_label_to_ignore_is_that_of_the_constructor() -> None:
    model = tiny("Llama")
    batch = ragged()
    ignored = int(batch["input_ids"][0, 3])
    batch |= {"labels": batch["input_ids"].clone(), "ignore_index": ignored}
    with torch.no_grad():
        torch.testing.assert_close(zoext.CompactLoss(model, ignore_index=ignored)(batch), full(model, batch))
        with pytest.raises(CompactLossError, match=rf"build CompactLoss\(model, ignore_index={ignored}\)"):
            zoext.CompactLoss(model)(batch)


@pytest.mark.parametrize(
    ("name", "keyword", "value"),
    [
        ("Llama", "weight", torch.ones(VOCABULARY)),
        ("Llama", "adapter_names", ["a", "b", "c"]),
        ("BERT", "reduction", "sum"),
        ("Mixtral", "output_router_logits", True),
        ("Llama", "output_router_logits", True),
    ],
)
def test_keywords_that_only_the_whole_model_may_use_are_refused(name: str, keyword: str, value: Any) -> None:
    with torch.no_grad(), pytest.raises(CompactLossError, match=rf"batch\['{keyword}'\]: the base model of"):
        zoext.CompactLoss(tiny(name))({**ragged(), keyword: value})


@pytest.mark.parametrize(
    "keywords",
    [
        {"position_ids": torch.arange(9).flip(0).expand(3, 9)},
        {"output_attentions": True, "output_hidden_states": True},
        {"return_dict": True},
    ],
)
def test_keywords_of_layers_are_passed_on(keywords: dict[str, Any]) -> None:
    model, batch = tiny("Llama", scale=3.0), {**ragged(), **keywords}
    with torch.no_grad():
        torch.testing.assert_close(zoext.CompactLoss(model)(batch), full(model, batch))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("Gemma 2, capped", "final_logit_softcapping", 0.02),
        ("RecurrentGemma, capped", "logits_soft_cap", 0.02),
        ("Cohere, scaled", "logit_scale", 3.0),
        ("Granite, divided", "logits_scaling", 0.2),
    ],
)
def test_settings_are_read_when_called(name: str, setting: str, value: float) -> None:
    model = tiny(name, scale=3.0)
    loss = zoext.CompactLoss(model)
    before = full(model, ragged())
    holder = model if hasattr(model, setting) else model.config
    setattr(holder, setting, value)
    want = full(model, ragged())
    assert abs(float(want - before)) > 1e-4
    with torch.no_grad():
        torch.testing.assert_close(loss(ragged()), want)


def set_cap(model: Any) -> None:
    model.config.final_logit_softcapping = 0.1


def set_temperature(model: Any) -> None:
    model.config.logits_temperature = 0.5


def set_routers(model: Any) -> None:
    model.config.output_router_logits = True


def set_loss(model: Any) -> None:
    model.loss_function = lambda logits, labels, **_: logits.square().mean()


def set_forward(model: Any) -> None:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


def add_hook(model: Any) -> None:
    model.register_forward_hook(lambda module, arguments, output: None)


def add_pre_hook(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, arguments: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_cap, r"config\.final_logit_softcapping of the model changed"),
        (set_temperature, r"config\.logits_temperature of the model changed"),
        (set_routers, "output_router_logits=True adds the loss of the routers"),
        (set_loss, "the loss_function of the model changed"),
        (set_forward, "the forward of the model changed"),
        (add_hook, "a forward hook of the model changed"),
        (add_pre_hook, "a forward hook of the model changed"),
    ],
)
def test_changes_that_it_would_leave_out_are_refused(change: Callable[[Any], None], message: str) -> None:
    model = tiny("Llama")
    loss = zoext.CompactLoss(model)
    change(model)
    with torch.no_grad(), pytest.raises(CompactLossError, match=f"{message}.*use the loss of the model"):
        loss(ragged())


def test_hooks_around_adapters_are_seen_until_they_are_removed() -> None:
    with quiet():
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny("Llama"), config).eval()
    loss = zoext.CompactLoss(model)
    with torch.no_grad():
        for module in (model, model.base_model, model.get_base_model()):
            hook = module.register_forward_hook(lambda module, arguments, output: None)
            with pytest.raises(CompactLossError, match="a forward hook of the model changed"):
                loss(ragged())
            hook.remove()
            torch.testing.assert_close(loss(ragged()), full(model, ragged()))
        hook = model.get_base_model().model.register_forward_hook(lambda module, arguments, output: None)
        torch.testing.assert_close(loss(ragged()), full(model, ragged()))


def test_new_loss_sees_harmless_hooks() -> None:
    model = tiny("Llama")
    add_hook(model)
    with torch.no_grad():
        torch.testing.assert_close(zoext.CompactLoss(model)(ragged()), full(model, ragged()))
