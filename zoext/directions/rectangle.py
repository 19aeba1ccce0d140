"""Steps as the rectangle of seeds and coefficients that the operators take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoext.directions.base import Terms


def rectangle(steps: Sequence[Terms]) -> tuple[Tensor, Tensor]:
    """Seeds (int64 [S, K]) and coefficients (float32 [S, K]), K terms for the step that has most.

    Shorter steps are filled up with coefficients of zero, whose terms the operators leave out.
    """
    longest = max(map(len, steps))
    seeds = [_filled_up(step.seeds, longest) for step in steps]
    coefficients = [_filled_up(step.coefficients, longest) for step in steps]
    return torch.stack(seeds), torch.stack(coefficients)


def _filled_up(terms: Tensor, count: int) -> Tensor:
    return terms if len(terms) == count else pad(terms, (0, count - len(terms)))


def terms_of(steps: Sequence[Terms]) -> tuple[Tensor, Tensor]:
    """Seeds and coefficients of an axpy_: [K] for a single step, else [S, K]."""
    return (steps[0].seeds, steps[0].coefficients) if len(steps) == 1 else rectangle(steps)


def decay_of(steps: Sequence[Terms], decay: Tensor | None) -> Tensor:
    """The decay of each step, none if there is none."""
    if decay is not None:
        return decay
    return torch.zeros(len(steps), dtype=torch.float32, device=steps[0].seeds.device)
