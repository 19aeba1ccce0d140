"""Stands for the model in ``Trainer.compute_loss``, with logits for labelled tokens only."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from zoext._runtime import notices
from zoext.losses import CompactLoss, CompactLossError, NotALanguageModelError


class CompactForward:
    """The forward of a model as far as ``Trainer.compute_loss`` reads it: its loss.

    What ``CompactLoss`` refuses runs the model itself, which is told once unless it is no language model.
    Everything else that ``compute_loss`` does, such as scaling by the number of processes, stays its own.
    """

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        self.model = model
        self.copies: int | None = None  # of the batch, whose losses are wanted one by one
        self._autocast = trainer.accelerator.autocast  # which Accelerate puts around the model's forward only
        self._compact: CompactLoss | None = None
        self._refusal: CompactLossError | None = None
        try:
            with self._autocast():
                self._compact = CompactLoss(model)
        except CompactLossError as error:
            self._refuse(error)

    @classmethod
    def of(cls, trainer: Trainer, model: nn.Module) -> CompactForward | None:
        """The one of ``model``, unless the loss of the trainer reads more of the outputs of the model."""
        own = (
            type(trainer).compute_loss is not Trainer.compute_loss
            or trainer.compute_loss_func is not None
            or trainer.label_smoother is not None
        )
        wanted = getattr(trainer.args, "zo_compact_loss", True)
        return cls(trainer, model) if wanted and not own else None

    def __call__(self, **inputs: Any) -> Any:
        if self._compact is not None and "labels" in inputs:
            batch = dict(inputs)
            if not self._compact.follows_num_items:
                batch.pop("num_items_in_batch", None)
            try:
                with self._autocast():
                    return {"loss": self._compact(batch, self.copies)}
            except CompactLossError as error:
                self._refuse(error)
        if self.copies is not None:
            raise ValueError(
                "probe='batched' needs a loss for each copy of the batch, which CompactLoss has for language "
                f"models that it takes; use probe='streamed'. {self._cause}"
            ) from self._refusal
        return self.model(**inputs)

    @property
    def _cause(self) -> str:
        return str(self._refusal or "The batch has no entry 'labels'")

    def _refuse(self, error: CompactLossError) -> None:
        self._compact, self._refusal = None, error
        if not isinstance(error, NotALanguageModelError):
            notices.warn(
                f"the loss makes logits for all tokens, with a label or not (zo_compact_loss): {error}"
            )
