"""Losses for forward-only training: of several copies of a batch, and of the labelled tokens only."""

from zoext.losses._copies import mean_per_copy, repeat

__all__ = ["mean_per_copy", "repeat"]
