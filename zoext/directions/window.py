"""A window of steps as the rectangle of seeds and coefficients that the operators take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoext.directions.base import Window


def rectangle(window: Window) -> tuple[Tensor, Tensor]:
    """Seeds (int64 [H, K]) and coefficients (float32 [H, K]), K terms for the step that has most.

    Shorter steps are filled up with coefficients of zero, whose terms the operators leave out.
    """
    longest = max(map(len, window.steps))
    seeds = [pad(step.seeds, (0, longest - len(step))) for step in window.steps]
    coefficients = [pad(step.coefficients, (0, longest - len(step))) for step in window.steps]
    return torch.stack(seeds), torch.stack(coefficients)
