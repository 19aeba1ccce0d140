"""Whether the parts of a model give the logits and the loss of the whole."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoext.losses._architectures import Parts, parts_of
from zoext.losses._refusals import CompactLossError

_IGNORED = -100
_EXAMPLES, _LENGTH = 2, 7
#: The largest difference of logits, relative to the largest logit, that rounding explains.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4}
_OF_16_BITS = 3e-2


@dataclass(frozen=True)
class Agreement:
    """Parts that agree with their model.

    Attributes:
        parts: a way to take the model apart.
        scales: whether the model divides its loss by ``num_items_in_batch``.
        takes_shifted: whether the model takes ``shift_labels``, which are labels where they are predicted.
    """

    parts: Parts
    scales: bool
    takes_shifted: bool


def find(model: nn.Module) -> Agreement:
    """The first way of taking ``model`` apart that gives its logits and its loss on a few tokens.

    Raises:
        CompactLossError: if there is none.
    """
    last: CompactLossError | None = None
    whole: _Whole | None = None
    for parts in parts_of(model):
        with _evaluating(parts.model), torch.no_grad():
            try:
                whole = whole or _Whole(parts)
                whole.compare(parts)
                return Agreement(parts, whole.scales, whole.takes_shifted)
            except CompactLossError as error:
                last = error
            except Exception as error:
                raise CompactLossError(
                    f"{type(parts.model).__name__} did not run on a few tokens, on which CompactLoss "
                    f"compares losses: {type(error).__name__}: {error}; use the loss of the model"
                ) from error
    assert last is not None
    raise last


class _Whole:
    """The logits and the losses of the whole model on a few tokens."""

    def __init__(self, parts: Parts) -> None:
        model: Any = parts.model
        self.batch = _batch(parts)
        output = model(**self.batch, return_dict=True)
        self.logits: Tensor = output.logits
        self.loss = float(output.loss)
        self.scales = self.takes_shifted = False
        takes = inspect.signature(parts.model.forward).parameters.values()
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes):
            losses = [float(model(**self.batch, num_items_in_batch=n, return_dict=True).loss) for n in (1, 2)]
            self.scales = abs(losses[0] - 2 * losses[1]) < 0.1 * abs(losses[0])
            self.takes_shifted = parts.kind == "causal" and self._takes_shifted(model)

    def _takes_shifted(self, model: Any) -> bool:
        """Whether ``shift_labels`` count: the mean loss of no label is NaN."""
        nothing = torch.full_like(self.batch["labels"], _IGNORED)
        try:
            loss = model(**self.batch, shift_labels=nothing, return_dict=True).loss
        except TypeError:
            return False
        return bool(loss.isnan())

    def compare(self, parts: Parts) -> None:
        """Raises a CompactLossError unless ``parts`` agree."""
        labels = self.batch["labels"]
        hidden = parts.hidden_states(self.batch, labels)
        logits = parts.head.logits(hidden.reshape(-1, hidden.shape[-1]))
        own = self.logits.reshape(-1, self.logits.shape[-1])
        tolerance = max(_TOLERANCES.get(dtype, _OF_16_BITS) for dtype in (logits.dtype, hidden.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        name = type(parts.model).__name__
        if logits.shape != own.shape:
            raise CompactLossError(
                f"the head of {name} makes logits {list(logits.shape)}, and the model {list(own.shape)}; use "
                "the loss of the model"
            )
        scale = float(own.abs().amax()) or 1.0
        difference = float((logits - own).abs().amax()) / scale
        if difference > tolerance:
            raise CompactLossError(
                f"the head of {name} alone makes other logits than the model: by {difference:.1e} of the "
                "largest. If the model runs under autocast, build CompactLoss and call it under it, too; "
                "else the forward of the model does something to them that CompactLoss does not know: use "
                "the loss of the model"
            )
        loss = float(_loss(logits, labels, parts.kind))
        if abs(loss - self.loss) > tolerance * max(scale, abs(self.loss), 1.0):
            raise CompactLossError(
                f"the loss of {name} is not the mean cross-entropy of its labels: it returns "
                f"{self.loss:.6g}, and that is {loss:.6g}; use the loss of the model"
            )


def _loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    rows = logits.reshape(*labels.shape, -1)
    if kind == "causal":
        rows, labels = rows[:, :-1], labels[:, 1:]
    return cross_entropy(rows.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)


def _batch(parts: Parts) -> dict[str, Tensor]:
    """Tokens from all over the vocabulary, some without a label."""
    core: Any = parts.model
    embeddings = core.get_input_embeddings().weight
    size = int(core.config.get_text_config().vocab_size)
    shape = _EXAMPLES, _LENGTH
    places = torch.arange(_EXAMPLES * _LENGTH, device=embeddings.device).reshape(shape)
    tokens = (places * 7919 + 5) % size
    labels = tokens.roll(3, 1).clone()
    labels[0, 3], labels[1, 4:] = _IGNORED, _IGNORED
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
