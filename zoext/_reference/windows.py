"""Update rules over windows of estimates: what dense and factored ``window_`` have in common.

The rules are those of ``csrc/core/rules.h``. A rule that is added there needs its move here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoext._reference.places import Places
from zoext._reference.steps import RoundingSeeds, Target
from zoext._reference.weights import combination, empty_sum
from zoext.ops import Rounding, Rule


class Window(NamedTuple):
    """The arguments of ``window_``: S windows of H steps over a history of S + H - 1 rows of K terms."""

    seeds: Tensor  # int64 [S + H - 1, K]
    coefficients: Tensor  # float32 [S + H - 1, K]
    first_weights: Tensor  # float32 [S, H]
    second_weights: Tensor  # float32 [S, H]
    lr: Tensor  # float32 [S]
    eps: Tensor  # float32 []
    decay: Tensor  # float32 [S]

    @classmethod
    def of(
        cls,
        seeds: Tensor,
        coefficients: Tensor,
        first_weights: Tensor,
        second_weights: Tensor,
        lr: Tensor,
        eps: Tensor,
        decay: Tensor,
    ) -> Window:
        """Also takes the weights of a single window, [H]."""
        if first_weights.dim() == 1:
            first_weights, second_weights = first_weights.unsqueeze(0), second_weights.unsqueeze(0)
        lr, decay = lr.reshape(-1), decay.reshape(-1)
        return cls(seeds, coefficients, first_weights, second_weights, lr, eps.reshape(()), decay)


def window_(targets: Sequence[Target], window: Window, rounding: Rounding, rule: Rule) -> None:
    """``theta = theta + (move - decay theta)``, one window after another."""
    steps, horizon = window.first_weights.shape
    terms = window.seeds.shape[1]
    contributes = (window.coefficients != 0).any(1)
    moves = [
        contributes[s : s + horizon].any() & (window.lr[s] != 0) for s in range(steps)
    ]  # whether the rule moves theta; decay does so regardless
    newest = window.seeds[horizon - 1 :, 0] if horizon and terms else window.seeds.flatten()[:0]
    random = RoundingSeeds(rounding, newest)
    for target in targets:
        for tile in target.tiles():
            estimates: deque[Tensor] = deque(maxlen=horizon)
            for row in range(steps + horizon - 1):
                own = target.terms[row * terms : (row + 1) * terms]
                estimates.append(combination(own, window.coefficients[row], tile.places, tile.arithmetic))
                s = row - horizon + 1
                if s < 0:
                    continue
                move = _move(window, s, contributes[s : s + horizon], estimates, rule, tile.places)
                change = torch.where(moves[s], move, -0.0)
                decay = window.decay[s]
                tile.move(change, decay, moves[s] | (decay != 0), random.bits(s, target.key))
            tile.write(target.theta, target.residual)


def _move(
    window: Window, step: int, contributes: Tensor, estimates: Sequence[Tensor], rule: Rule, places: Places
) -> Tensor:
    """The move that the rule computes from the window that ends with the newest of ``estimates``."""
    horizon = len(estimates)
    dtype = estimates[0].dtype
    m = empty_sum(places, dtype, window.lr.device)
    v = torch.zeros_like(m[:1] if rule == Rule.SCALAR_ADAM else m)
    projections = window.coefficients[step : step + horizon].to(dtype).sum(1)
    for h, g in enumerate(estimates):
        first = window.first_weights[step, h].to(dtype)
        second = window.second_weights[step, h].to(dtype)
        # Unless the rule squares it, an estimate with a weight of zero is left out, even if it is not finite.
        enters = contributes[h] if rule == Rule.ADAM else contributes[h] & (first != 0)
        m = torch.where(enters, m + first * g, m)
        if rule != Rule.SIGN:
            squared = g if rule == Rule.ADAM else projections[h]
            v = torch.where(contributes[h], v + second * (squared * squared), v)
    minus_lr, eps = -window.lr[step].to(dtype), window.eps.to(dtype)
    if rule == Rule.SIGN:
        return minus_lr * ((m > 0).to(dtype) - (m < 0).to(dtype))
    return minus_lr * (m / ((v + eps).sqrt() if rule == Rule.ADAM else v.sqrt() + eps))
