"""What a language model of transformers does between its last hidden states and its logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from zoext.losses._refusals import CompactLossError

_Operation = Callable[[Tensor], Tensor]

#: Modules, by attribute, that some models apply one after the other instead of a single head.
_CHAINS = (
    ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),  # DistilBERT
    ("generator_predictions", "generator_lm_head"),  # ELECTRA, ConvBERT
    ("head", "decoder"),  # ModernBERT
    ("lm_head", "decoder"),  # ModernBERT's decoder
)
#: Settings that multiply logits. ``logits_scaling`` divides them in Granite, and multiplies in HyperCLOVA X.
_FACTORS = ("lm_head_multiplier", "output_multiplier", "logit_scale")
_DIVISOR = "logits_scaling"
#: Settings with the ``c`` of ``c tanh(logits / c)``.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
#: Other settings by such names change the logits in a way that is unknown here, unless they are of attention.
_SUSPICIOUS = re.compile(r"logit.*(cap|scal|mul|temp)|(cap|scal|mul|temp).*logit")
_ELSEWHERE = re.compile(r"attn|attention|router|index")


@dataclass(frozen=True)
class Head:
    """The operations that make logits [n, V] of hidden states [n, d], in order."""

    operations: tuple[_Operation, ...]
    vocabulary: int

    def logits(self, rows: Tensor) -> Tensor:
        """The logits of rows, in the dtype that the head makes."""
        for operation in self.operations:
            rows = operation(rows)
        return rows


def heads_of(model: nn.Module, base: nn.Module | None) -> Iterator[Head]:
    """The heads that ``model`` may have, the likeliest first.

    Raises:
        CompactLossError: if it has no head that is known here.
    """
    config: Any = model.config
    settings = _Settings(model, config)
    modules = _modules(model, base)
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    vocabulary = int(getattr(output, "out_features", None) or settings.of("vocab_size") or 2**15)
    for before, divide in product(_inputs(config, base), _divisors(settings)):
        operations: tuple[_Operation, ...] = (
            *before,
            *modules,
            *_biases(model),
            *_factors(settings),
            *divide,
            *_caps(settings),
        )
        yield Head(operations, vocabulary)


class _Settings:
    """The settings of a model that are set, of its text part too."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        self._places = (model, config, text)
        known = (*_FACTORS, _DIVISOR, *_CAPS)
        for name in {**vars(config), **vars(text)}:
            is_unknown = name not in known and _SUSPICIOUS.search(name) and not _ELSEWHERE.search(name)
            if is_unknown and self.of(name) not in (None, 0, 1):
                raise CompactLossError(
                    f"config.{name}={self.of(name)!r} may change the logits of {type(model).__name__} in a "
                    "way that CompactLoss does not know; use the loss of the model"
                )

    def of(self, name: str) -> Any:
        found = (getattr(place, name, None) for place in self._places)
        return next((value for value in found if isinstance(value, int | float)), None)


def _modules(model: nn.Module, base: nn.Module | None) -> list[_Operation]:
    """The modules between the hidden states and the logits, looked up when they run: they may be replaced."""
    return [partial(_run, model, name) for name in _names(model, base)]


def _names(model: nn.Module, base: nn.Module | None) -> tuple[str, ...]:
    kind = type(model).__name__
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    if output is None:
        raise CompactLossError(f"{kind} has no output embeddings; use the loss of the model")

    def holds(module: nn.Module) -> bool:
        return any(part is output for part in module.modules())

    for names in _CHAINS:
        chain = [getattr(model, name, None) for name in names]
        if all(isinstance(part, nn.Module) for part in chain) and holds(chain[-1]):  # type: ignore[arg-type]
            return names
    children = [name for name, child in model.named_children() if child is not base and holds(child)]
    if len(children) != 1:
        raise CompactLossError(
            f"{kind} has its output embeddings in {len(children)} of its modules beside the base model, so "
            "its head is unknown; use the loss of the model"
        )
    return (children[0],)


def _inputs(config: Any, base: nn.Module | None) -> list[list[_Operation]]:
    """What may be done to the hidden states first: models like T5 scale them if their head is tied."""
    width = getattr(config, "d_model", None)
    if base is not None or not width:
        return [[]]
    scaled: list[_Operation] = [partial(_multiply, width**-0.5)]
    is_scaled = getattr(config, "scale_decoder_outputs", getattr(config, "tie_word_embeddings", False))
    return [scaled, []] if is_scaled else [[], scaled]


def _biases(model: nn.Module) -> list[_Operation]:
    bias = getattr(model, "final_logits_bias", None)  # BART and its kin
    return [lambda logits: logits + model.get_buffer("final_logits_bias")] if bias is not None else []


def _factors(settings: _Settings) -> list[_Operation]:
    return [partial(_multiply, factor) for name in _FACTORS if (factor := settings.of(name)) is not None]


def _divisors(settings: _Settings) -> list[list[_Operation]]:
    divisor = settings.of(_DIVISOR)
    if divisor is None:
        return [[]]
    return [[partial(_divide, divisor)], [partial(_multiply, divisor)]]


def _caps(settings: _Settings) -> list[_Operation]:
    return [partial(_cap, cap) for name in _CAPS if (cap := settings.of(name))]


def _run(model: nn.Module, name: str, rows: Tensor) -> Tensor:
    logits: Tensor = getattr(model, name)(rows)
    return logits


def _multiply(factor: float, x: Tensor) -> Tensor:
    return x * factor


def _divide(divisor: float, x: Tensor) -> Tensor:
    return x / divisor


def _cap(cap: float, logits: Tensor) -> Tensor:
    return torch.tanh(logits / cap) * cap
