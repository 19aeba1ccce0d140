"""Takes a language model of transformers apart: its base model, its head, and which labels it predicts."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoext.losses._changes import Comparison
from zoext.losses._heads import Head, heads_of
from zoext.losses._refusals import CompactLossError, NotALanguageModelError

#: The tables of transformers with the names of classes, and how their losses align labels.
_TABLES = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "seq2seq",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "causal",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "masked",
}
_SUFFIXES = {"ForMaskedLM": "masked", "ForCausalLM": "causal", "LMHeadModel": "causal"}
#: Arguments of a model that its base model never sees, as far as they are allowed.
_OWN = ("labels", "num_items_in_batch", "shift_labels", "ignore_index")
#: Keywords that a base model passes to its layers, beside those of ``TransformersKwargs``.
_PASSED_ON = ("return_dict",)
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
_IGNORED = -100  # in the labels that models shift
_ROUTERS = "output_router_logits"  # which adds their loss


@dataclass(frozen=True)
class Parts:
    """A language model in parts.

    Attributes:
        model: the whole model, without wrappers of processes.
        kind: "causal", whose labels are predicted from the token before; "masked"; or "seq2seq".
        head: from hidden states to logits.
        is_replicated: whether the model was in DistributedDataParallel.
    """

    model: nn.Module
    kind: str
    head: Head
    is_replicated: bool
    _core: Any
    _base: nn.Module | None
    _known: frozenset[str]  # the arguments that the base model names
    _unseen: frozenset[str]  # those that only the whole model does
    _passed_on: frozenset[str]  # others that the base model passes to its layers
    _comparison: Comparison

    def hidden_states(self, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """The hidden states of a batch, [B, T, d], that the head makes logits of."""
        self._comparison.check()
        _check_adapters(self.model)
        _check(self._core)
        batch = {name: batch[name] for name in batch if name not in _OWN}
        self._check_names(batch)
        if "use_cache" in self._known:
            batch.setdefault("use_cache", False)
        if self.kind == "seq2seq" and not {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys():
            batch["decoder_input_ids"] = self._decoder_inputs(labels)
        if self._base is not None:
            hidden: Tensor = self._base(**batch)[0]
            return hidden
        return self._decoded(batch)

    def _decoded(self, batch: dict[str, Any]) -> Tensor:
        """The hidden states of a model whose encoder and decoder have no module around them."""
        decoder = {
            name.removeprefix("decoder_"): batch.pop(name) for name in [*batch] if name.startswith("decoder_")
        }
        decoder["use_cache"] = batch.pop("use_cache", False)
        encoded = batch.pop("encoder_outputs", None)
        mask = batch.get("attention_mask")
        encoded = self._core.encoder(**batch) if encoded is None else encoded
        hidden: Tensor = self._core.decoder(
            **decoder, encoder_hidden_states=encoded[0], encoder_attention_mask=mask
        )[0]
        return hidden

    def _decoder_inputs(self, labels: Tensor) -> Tensor:
        """The labels one place to the right, as the model itself shifts them."""
        if hasattr(self._core, "prepare_decoder_input_ids_from_labels"):
            shifted: Tensor = self._core.prepare_decoder_input_ids_from_labels(labels)
            return shifted
        config = self._core.config
        shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
        return shifted.masked_fill(shifted == _IGNORED, config.pad_token_id)

    def _check_names(self, batch: dict[str, Any]) -> None:
        """Refuses arguments that only the forward or the loss of the whole model would use."""
        for name, value in batch.items():
            is_of_loss = name == _ROUTERS and value
            if name in self._unseen or name not in self._known | self._passed_on or is_of_loss:
                raise CompactLossError(
                    f"batch[{name!r}]: the base model of {type(self._core).__name__} does not take it, so "
                    "the compact loss would not see it; leave it out, or use the loss of the model"
                )


def parts_of(model: nn.Module) -> Iterator[Parts]:
    """The ways in which ``model`` may be taken apart, the likeliest first.

    Raises:
        CompactLossError: for a model that cannot be; the message names the cause.
    """
    core = _innermost(model)
    kind = _kind_of(core)
    whole, is_replicated = _unwrapped(model)
    for part in (whole, core):
        _check_uncompiled(part)
    _check_adapters(whole)
    _check(core)
    base: Any = core.base_model
    if base is core:
        if kind != "seq2seq" or not (hasattr(core, "encoder") and hasattr(core, "decoder")):
            raise CompactLossError(
                f"{type(core).__name__} has no base model beside its head; use the loss of the model"
            )
        base = None
    own, takes_any = _arguments(core if base is None else base)
    if not own:  # a wrapper that passes all on to the decoder
        own, _ = _arguments(core.get_decoder())
    unseen = _arguments(core)[0] - own
    passed_on = _keywords() if takes_any else frozenset[str]()
    comparison = Comparison(model, core)
    for head in heads_of(core, base):
        yield Parts(whole, kind, head, is_replicated, core, base, own, unseen, passed_on, comparison)


def _innermost(model: nn.Module) -> Any:
    """The model of transformers inside wrappers and a model of peft."""
    core: Any = model
    while type(core).__name__ in (*_WRAPPERS, "OptimizedModule"):
        core = core._orig_mod if hasattr(core, "_orig_mod") else core.module
    return core.get_base_model() if hasattr(core, "get_base_model") else core


def _unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """The model without DistributedDataParallel, and whether it was in one."""
    if is_replicated := isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    names = [kind.__name__ for kind in type(model).__mro__]
    for name in ("FSDPModule", "FullyShardedDataParallel", "DataParallel"):
        if name in names:
            raise CompactLossError(
                f"the model is in {name}, which gathers or scatters in the forward of the whole model, and "
                "CompactLoss runs its parts; use the loss of the model"
            )
    return model, is_replicated


def _check_adapters(model: Any) -> None:
    if not hasattr(model, "peft_config"):
        return
    active = model.active_adapters  # a method of models of transformers that took an adapter themselves
    for adapter in active() if callable(active) else active:
        if getattr(model.peft_config[adapter], "is_prompt_learning", False):
            raise CompactLossError(
                f"the adapter {adapter!r} of peft adds tokens or keys in the forward of the whole model, and "
                "CompactLoss runs its parts; use the loss of the model"
            )


def _check_uncompiled(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise CompactLossError(
            "the model is compiled as a whole, and CompactLoss runs its parts, which would not be; compile "
            "the base model instead, model.base_model.compile(), or use the loss of the model"
        )


def _kind_of(model: nn.Module) -> str:
    names = [kind.__name__ for kind in type(model).__mro__]
    if "PreTrainedModel" in names:
        tables: Any = importlib.import_module("transformers.models.auto.modeling_auto")
        for table, kind in _TABLES.items():
            listed = {each for value in getattr(tables, table).values() for each in _several(value)}
            if not listed.isdisjoint(names):
                return kind
        for suffix, kind in _SUFFIXES.items():
            if type(model).__name__.endswith(suffix):
                return kind
    raise NotALanguageModelError(
        f"model must be a causal, masked or sequence-to-sequence language model of transformers, such as "
        f"LlamaForCausalLM, not {type(model).__name__}; use the loss of the model"
    )


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check(model: Any) -> None:
    """Refuses what the comparison with the model's loss would not find."""
    config = model.config
    if getattr(config, _ROUTERS, False):
        raise CompactLossError(
            "config.output_router_logits=True adds the loss of the routers to the loss of the model; set it "
            "to False, or use the loss of the model"
        )
    if hasattr(model, "_hf_hook"):
        raise CompactLossError(
            "the parts of the model are on several devices, or offloaded, by hooks of Accelerate around the "
            "whole model, and CompactLoss runs its parts; use the loss of the model"
        )
    if getattr(config, "attention_type", None) == "block_sparse":
        raise CompactLossError(
            "config.attention_type='block_sparse' changes with the length of the first batch; use the loss "
            "of the model"
        )


def _arguments(module: nn.Module) -> tuple[frozenset[str], bool]:
    """The names of the arguments of a forward, and whether it takes others."""
    parameters = inspect.signature(module.forward).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = frozenset(parameter.name for parameter in parameters if parameter.kind not in several)
    return names, any(parameter.kind is several[1] for parameter in parameters)


def _keywords() -> frozenset[str]:
    """The keywords that models of transformers take for their layers, such as those of flash attention."""
    generic: Any = importlib.import_module("transformers.utils.generic")
    return frozenset((*generic.TransformersKwargs.__annotations__, *_PASSED_ON))
