"""Losses for forward-only training: of several copies of a batch, and of the labelled tokens only."""

from zoext.losses._compact import CompactLoss
from zoext.losses._copies import mean_per_copy, repeat
from zoext.losses._refusals import CompactLossError, NotALanguageModelError

__all__ = ["CompactLoss", "CompactLossError", "NotALanguageModelError", "mean_per_copy", "repeat"]
