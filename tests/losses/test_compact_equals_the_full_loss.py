"""The compact loss is the loss of the model up to rounding, whatever its head does."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import zoext
from support.peft_methods import METHODS, TOKENS, Method, quiet
from support.tiny_language_models import MODELS, VOCABULARY, ragged, tiny


def full(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        loss: Tensor = model(**batch).loss
    return loss


def compact(model: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    with torch.no_grad():
        return zoext.CompactLoss(model, **options)(batch)


def assert_equal(got: Tensor, want: Tensor, rtol: float = 2e-6) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), rtol=rtol, atol=0)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", MODELS)
def test_loss_is_that_of_the_model(name: str, chunk: int | None) -> None:
    model = tiny(name)
    assert_equal(compact(model, ragged(), chunk=chunk), full(model, ragged()))


@pytest.mark.parametrize("name", ["Llama, tied", "Gemma 2, capped", "Granite, divided", "BERT", "T5", "OPT"])
def test_in_bfloat16(name: str) -> None:
    model = tiny(name, torch.bfloat16, scale=4.0)
    assert_equal(compact(model, ragged(5, 11)), full(model, ragged(5, 11)), rtol=1e-2)


@pytest.mark.parametrize("name", ["Llama", "BERT", "T5"])
def test_in_float64(name: str) -> None:
    model = tiny(name, torch.float64)
    got, want = compact(model, ragged()), full(model, ragged())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["Llama", "BERT", "BART"])
def test_under_autocast(name: str) -> None:
    model = tiny(name, scale=4.0)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compact(model, ragged()), full(model, ragged())
    assert_equal(got, want, rtol=1e-2)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_num_items_divide_the_sum(name: str, count: int | Tensor) -> None:
    model, batch = tiny(name), ragged()
    loss = zoext.CompactLoss(model)
    assert loss.follows_num_items
    want = full(model, {**batch, "num_items_in_batch": count})
    with torch.no_grad():
        assert_equal(loss(batch, num_items_in_batch=count), want)
        assert_equal(loss({**batch, "num_items_in_batch": count}), want)
        nothing = loss({**batch, "labels": batch["labels"].fill_(-100)}, num_items_in_batch=count)
    assert nothing == 0


@pytest.mark.parametrize("name", ["T5", "BART", "BERT"])
def test_num_items_are_ignored_where_the_model_ignores_them(name: str) -> None:
    model, batch = tiny(name), {**ragged(), "num_items_in_batch": 7}
    loss = zoext.CompactLoss(model)
    assert not loss.follows_num_items
    with torch.no_grad():
        assert_equal(loss(batch), full(model, batch))


@pytest.mark.parametrize("name", ["Llama", "BERT", "T5"])
@pytest.mark.parametrize("rows", [None, 4])
def test_no_label_is_nan_as_in_the_model(name: str, rows: int | None) -> None:
    model, batch = tiny(name), ragged()
    labels = torch.full_like(batch["labels"], -100)
    if zoext.CompactLoss(model).kind == "causal":
        labels[:, 0] = 5  # which nothing predicts
    batch["labels"] = labels
    assert full(model, batch).isnan()
    assert compact(model, batch, rows=rows).isnan()


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_smoothing_is_that_of_trainer(smoothing: float) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    model, batch = tiny("Llama"), ragged()
    with torch.no_grad():
        want = LabelSmoother(smoothing)(model(**batch), batch["labels"], shift_labels=True)
    assert_equal(compact(model, batch, label_smoothing=smoothing, chunk=3), want)


def test_other_label_is_ignored() -> None:
    model, batch = tiny("Llama"), ragged()
    want = full(model, batch)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, -1)
    assert_equal(compact(model, batch, ignore_index=-1), want)


@pytest.mark.parametrize("target", ["q_proj", "lm_head", "embed_tokens"])
def test_adapters_are_seen(target: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM")
        with quiet():
            model = peft.get_peft_model(tiny("Llama"), config).eval()
    loss = zoext.CompactLoss(model)
    with torch.no_grad():
        got = loss(ragged())
        assert_equal(got, full(model, ragged()))
        with model.disable_adapter():
            without = loss(ragged())
            assert_equal(without, full(model, ragged()))
    assert abs(float(got - without)) > 1e-4


def test_tuned_copy_of_the_head_is_used() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with quiet():
        model = peft.get_peft_model(tiny("Llama"), config).eval()
    copy = model.base_model.model.lm_head.modules_to_save["default"].weight
    copy.data.mul_(0.5)
    assert_equal(compact(model, ragged()), full(model, ragged()))


def test_replaced_parts_are_seen() -> None:
    """Such as by ``resize_token_embeddings``, after the loss was made."""
    model, batch = tiny("Llama"), ragged()
    loss = zoext.CompactLoss(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model.resize_token_embeddings(VOCABULARY + 6)
    model.lm_head.weight.data[VOCABULARY:] += 1
    batch["labels"][0, 4] = VOCABULARY + 2
    with torch.no_grad():
        assert_equal(loss(batch), full(model, batch))


def test_gradients_are_those_of_the_model() -> None:
    one, other = tiny("Llama, tied"), tiny("Llama, tied")
    one(**ragged()).loss.backward()
    zoext.CompactLoss(other, chunk=4)(ragged()).backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_model_is_left_as_it_was() -> None:
    model = tiny("GPT-2", resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    zoext.CompactLoss(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


ADDS = "of peft adds tokens or keys"
#: What the forward of the whole model does, beyond what its parts do.
REFUSED = {
    "LoRA on a classifier": "not BertForSequenceClassification",
    "AdaLoRA": "the loss of PeftModelForCausalLM is not the mean",
    "Cartridge": ADDS,
    "CPT": ADDS,
    "Multitask prompt tuning": ADDS,
    "P-tuning (MLP)": ADDS,
    "P-tuning (LSTM)": ADDS,
    "Poly": "did not run on a few tokens, .* task_ids",
    "Prefix tuning": ADDS,
    "Prefix tuning (MLP)": ADDS,
    "Prompt tuning": ADDS,
    "Shadow": "the loss of PeftModelForCausalLM is not the mean",
    "X-LoRA": "makes other logits than the model",
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_of_peft_is_equal_or_refused(method: Method) -> None:
    model = method.build()
    labels = TOKENS.clone()
    labels[:, :5] = -100
    batch = {"input_ids": TOKENS, "labels": labels, **method.inputs()}
    if method.name in REFUSED:
        with quiet(), pytest.raises(zoext.losses.CompactLossError, match=REFUSED[method.name]):
            zoext.CompactLoss(model)
        return
    with quiet(), torch.no_grad():
        got = zoext.CompactLoss(model)(batch)
        torch.testing.assert_close(got, model(**batch).loss, rtol=1e-6, atol=0, check_dtype=False)
