"""What a language model of transformers does between its last hidden states and its logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
_KNOWN = (*_FACTORS, _DIVISOR, *_CAPS)
#: Settings that say whether hidden states are scaled before a tied head.
_TIED = ("scale_decoder_outputs", "tie_word_embeddings")
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
    settings = Settings(model)
    for name, value in settings.unknown().items():
        if value not in (None, 0, 1):
            raise CompactLossError(
                f"config.{name}={value!r} may change the logits of {type(model).__name__} in a way that "
                "CompactLoss does not know; use the loss of the model"
            )
    modules = _modules(model, base)
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    vocabulary = int(getattr(output, "out_features", None) or settings.of("vocab_size") or 2**15)
    for before, divide in product(_inputs(config, base), _divisors(settings)):
        operations: tuple[_Operation, ...] = (
            *before,
            *modules,
            *_biases(model),
            *_scaled(settings, _FACTORS, _multiply),
            *divide,
            *_scaled(settings, _CAPS, _cap),
        )
        yield Head(operations, vocabulary)


class Settings:
    """The settings of a model that are set, of its text part too."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._configs: tuple[Any, Any] = (None, None)
        self._suspicious: tuple[int, list[str]] = (0, [])

    def of(self, name: str) -> Any:
        return _first_number(getattr(place, name, None) for place in (self._model, *self._found()))

    def unknown(self) -> dict[str, Any]:
        """What may change the logits in a way that is unknown here."""
        stored = self._stored()
        return {name: _first_number(place.get(name) for place in stored) for name in self._names(stored)}

    def unread(self) -> dict[str, Any]:
        """What logits may depend on and a ``Head`` does not read when it runs. Every forward compares it."""
        stored = self._stored()
        values = {name: _first_number(place.get(name) for place in stored) for name in (*_TIED, *_KNOWN)}
        return self.unknown() | values | {name: values[name] is None for name in _KNOWN}

    def _names(self, stored: Sequence[dict[str, Any]]) -> list[str]:
        count = sum(map(len, stored[1:]))
        if count != self._suspicious[0]:
            names = sorted({*stored[1], *stored[2]} - {*_KNOWN})
            found = [name for name in names if _SUSPICIOUS.search(name) and not _ELSEWHERE.search(name)]
            self._suspicious = count, found
        return self._suspicious[1]

    def _stored(self) -> Sequence[dict[str, Any]]:
        """What the model and its configurations hold. Their ``__getattribute__`` takes long."""
        return tuple(map(vars, (self._model, *self._found())))

    def _found(self) -> tuple[Any, Any]:
        config: Any = self._model.config
        if config is not self._configs[0]:  # whose text part takes long to find
            has_text = hasattr(config, "get_text_config")
            self._configs = config, config.get_text_config(decoder=True) if has_text else config
        return self._configs


def _first_number(values: Iterable[Any]) -> Any:
    return next((value for value in values if isinstance(value, int | float)), None)


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
    is_scaled = getattr(config, _TIED[0], getattr(config, _TIED[1], False))
    return [scaled, []] if is_scaled else [[], scaled]


def _biases(model: nn.Module) -> list[_Operation]:
    bias = getattr(model, "final_logits_bias", None)  # BART and its kin
    return [lambda logits: logits + model.get_buffer("final_logits_bias")] if bias is not None else []


def _scaled(
    settings: Settings, names: tuple[str, ...], function: Callable[[float, Tensor], Tensor]
) -> list[_Operation]:
    """The operations of settings that are set now, with the values that they have when they run."""
    present = [name for name in names if settings.of(name) is not None]
    return [partial(_with, settings, name, function) for name in present]


def _divisors(settings: Settings) -> list[list[_Operation]]:
    if settings.of(_DIVISOR) is None:
        return [[]]
    return [_scaled(settings, (_DIVISOR,), function) for function in (_divide, _multiply)]


def _run(model: nn.Module, name: str, rows: Tensor) -> Tensor:
    logits: Tensor = getattr(model, name)(rows)
    return logits


def _with(
    settings: Settings, name: str, function: Callable[[float, Tensor], Tensor], logits: Tensor
) -> Tensor:
    return function(settings.of(name), logits)


def _multiply(factor: float, x: Tensor) -> Tensor:
    return x * factor


def _divide(divisor: float, x: Tensor) -> Tensor:
    return x / divisor


def _cap(cap: float, logits: Tensor) -> Tensor:
    return torch.tanh(logits / cap) * cap if cap else logits
