"""Plain gradient descent."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from zoext.directions import Terms
from zoext.updates.base import GroupStep, LinearUpdate


@dataclass(frozen=True)
class SGD(LinearUpdate):
    """``theta <- theta - lr * (g + weight_decay * theta)``: decoupled weight decay and no momentum.

    Steps whose estimate has a nonfinite loss do not decay theta.

    Args:
        normalized: divide g by the sample standard deviation of the losses it was computed
            from (FZOO, arXiv 2506.09034). The length of a step then does not depend on how steep the loss
            is, nor lr on its scale. If all losses are equal, g is taken to be zero.
    """

    normalized: bool = False

    def terms(self, step: GroupStep) -> Terms:
        coefficients = step.terms.coefficients * -step.lr
        if self.normalized:
            loss_std = step.estimate.loss_std
            coefficients = torch.where(loss_std > 0, coefficients / loss_std, 0.0)
        return dataclasses.replace(step.terms, coefficients=coefficients)
