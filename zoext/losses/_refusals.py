"""Models and batches that ``CompactLoss`` refuses."""

from __future__ import annotations


class CompactLossError(RuntimeError):
    """The compact loss of this model, or of this batch, is not known to equal the loss of the model."""


class NotALanguageModelError(CompactLossError):
    """The model is no causal, masked or sequence-to-sequence language model of transformers."""
