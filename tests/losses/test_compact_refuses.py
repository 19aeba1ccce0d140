"""What the compact loss would get wrong is refused, with the cause and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.fx.experimental import _config

import zoext
from support.peft_methods import quiet
from support.tiny_language_models import MODELS, VOCABULARY, ragged, tiny
from zoext.losses import CompactLossError, NotALanguageModelError
from zoext.losses._rows import RowFinder


class Shifting(transformers.LlamaForCausalLM):
    """Adds something to its logits that no setting tells of."""

    def forward(self, *arguments: Any, labels: Tensor | None = None, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = output.logits + torch.linspace(0, 1, VOCABULARY)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, vocab_size=VOCABULARY)
        return output


class Penalised(transformers.LlamaForCausalLM):
    """Adds something to its loss."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        if output.loss is not None:
            output.loss = output.loss + 0.1 * output.logits.square().mean()
        return output


def of(kind: type[transformers.PreTrainedModel], **settings: Any) -> nn.Module:
    config = transformers.LlamaConfig(**{**MODELS["Llama"][2], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def compiled() -> Any:
    return torch.compile(tiny("Llama"), backend="eager")


def compiled_in_place() -> nn.Module:
    model: nn.Module = tiny("Llama")
    model.compile(backend="eager")
    return model


def prompted() -> nn.Module:
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with quiet(), torch.random.fork_rng(devices=[]):
        adapted: nn.Module = peft.get_peft_model(tiny("Llama"), config)
    return adapted


def dispatched() -> nn.Module:
    from accelerate import cpu_offload

    offloaded: nn.Module = cpu_offload(tiny("Llama"), execution_device=torch.device("cpu"))
    return offloaded


def classifier() -> nn.Module:
    return of(transformers.LlamaForSequenceClassification, pad_token_id=0)


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "other modules": (
        lambda: nn.Linear(3, 2),
        NotALanguageModelError,
        "such as LlamaForCausalLM, not Linear",
    ),
    "classifiers": (classifier, NotALanguageModelError, "not LlamaForSequenceClassification"),
    "unknown logits": (
        lambda: of(Shifting),
        CompactLossError,
        "the head of Shifting alone makes other logits",
    ),
    "unknown losses": (
        lambda: of(Penalised),
        CompactLossError,
        "the loss of Penalised is not the mean cross-",
    ),
    "unknown settings": (
        lambda: of(transformers.LlamaForCausalLM, logits_temperature=0.7),
        CompactLossError,
        r"config\.logits_temperature=0\.7 may change the logits",
    ),
    "compiled": (
        lambda: torch.compile(tiny("Llama"), backend="eager"),
        CompactLossError,
        r"model\.base_model\.compile\(\)",
    ),
    "compiled in place": (compiled_in_place, CompactLossError, r"model\.base_model\.compile\(\)"),
    "prompts": (prompted, CompactLossError, "the adapter 'default' of peft adds tokens or keys"),
    "losses of routers": (
        lambda: tiny("Mixtral", output_router_logits=True),
        CompactLossError,
        "output_router_logits=True adds the loss of the routers",
    ),
    "offloaded": (dispatched, CompactLossError, "on several devices, or offloaded"),
    "in DataParallel": (
        lambda: nn.DataParallel(tiny("Llama")),
        CompactLossError,
        "the model is in DataParallel",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_are_refused(case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as raised:
        zoext.CompactLoss(make())
    assert "use the loss of the model" in str(raised.value)


def test_base_that_is_compiled_is_not() -> None:
    """What the refusal advises. A stand-in for the compiled code: compiling takes long."""
    model, calls = tiny("Llama"), []

    def run(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return model.base_model._call_impl(*arguments, **options)

    model.base_model._compiled_call_impl = run
    with torch.no_grad():
        zoext.CompactLoss(model)(ragged())
    assert calls


def changed(**entries: Any) -> dict[str, Any]:
    return {**ragged(), **entries}


@pytest.mark.parametrize(
    ("batch", "copies", "error", "message"),
    [
        ({"input_ids": ragged()["input_ids"]}, None, ValueError, "batch needs an entry 'labels'"),
        (changed(labels=[1, 2]), None, ValueError, r"must be a tensor \[B, T\], not list"),
        (changed(labels=torch.ones(9)), None, ValueError, r"must be a tensor \[B, T\], not \[9\]"),
        (ragged(), 2, ValueError, r"must be a tensor \[2 \* B, T\], not \[3, 9\]"),
        (ragged(4), 2, ValueError, "the 2 copies have labels at different positions"),
        (ragged(), 0, ValueError, "copies must be an integer of at least 1"),
        (
            changed(labels=ragged(3, 8)["labels"]),
            None,
            CompactLossError,
            r"\[3, 9, 16\] for labels .* \[3, 8\]",
        ),
        (
            changed(logits_to_keep=1),
            None,
            CompactLossError,
            r"batch\['logits_to_keep'\]: the base model of Ll",
        ),
    ],
)
def test_batches_are_refused(
    batch: dict[str, Any], copies: int | None, error: type[Exception], message: str
) -> None:
    with torch.no_grad(), pytest.raises(error, match=message):
        zoext.CompactLoss(tiny("Llama"))(batch, copies)


def test_arguments_are_checked() -> None:
    model = tiny("Llama")
    for name in ("rows", "chunk"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, not 0"):
            zoext.CompactLoss(model, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), not 1"):
        zoext.CompactLoss(model, label_smoothing=1)


def test_rows_that_are_too_few_are_told() -> None:
    batch = ragged()
    needed = int((batch["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        assert zoext.CompactLoss(tiny("Llama"), rows=needed)(batch).isfinite()
        with pytest.raises(ValueError, match=f"rows={needed - 1}, but the batch has {needed} labels"):
            zoext.CompactLoss(tiny("Llama"), rows=needed - 1)(batch)


def test_replicated_models_run_without_gradients_only() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny("Llama")
        loss = zoext.CompactLoss(nn.parallel.DistributedDataParallel(model))
        with torch.no_grad():
            torch.testing.assert_close(loss(ragged()), model(**ragged()).loss)
        with pytest.raises(
            CompactLossError, match=r"gradients would not be averaged; call it under torch\.no_gr"
        ):
            loss(ragged())
    finally:
        dist.destroy_process_group()


def test_autocast_of_the_model_alone_is_told() -> None:
    model = tiny("Llama")
    forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    with pytest.raises(
        CompactLossError, match="If the model runs under autocast, build CompactLoss and call it"
    ):
        zoext.CompactLoss(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = zoext.CompactLoss(model)(ragged()), model(**ragged()).loss
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)


def test_nothing_waits_for_a_device_with_rows() -> None:
    """Tensors without values stand for those of a device: whatever reads a value on the host raises."""
    batch = {name: ragged()[name].to("meta") for name in ("input_ids", "labels")}
    model, other = tiny("BERT"), tiny("BERT")
    loss, reading = zoext.CompactLoss(model, rows=20), zoext.CompactLoss(other)
    model.to("meta")
    other.to("meta")
    with torch.no_grad():
        assert loss(batch).shape == ()
        assert loss(zoext.repeat(batch, 2), copies=2).shape == (2,)
        assert loss.per_example(batch).shape == (3,)
        with pytest.raises(NotImplementedError, match="nonzero"):
            reading(batch)


def test_labels_are_counted_once_on_a_device() -> None:
    """Also if several micro-batches take turns. All of these labels count, as torch has it."""
    finder = RowFinder(shift=0, ignore_index=-100, rows=None)
    one, other = (torch.zeros(2, 3, dtype=torch.int64, device="meta") for _ in range(2))
    with _config.patch(meta_nonzero_assume_all_nonzero=True):
        rows, others = finder.find(one, 1), finder.find(other, 1)
        assert finder.find(one, 1) is rows
        assert finder.find(other, 1) is others is not rows
        assert finder.find(one, 2) is not rows
        rows = finder.find(one, 1)
        one.fill_(3)
        assert finder.find(one, 1) is not rows
