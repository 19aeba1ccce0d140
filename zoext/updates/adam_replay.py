"""Adam whose moments are replayed from seeds and never stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoext._parameters.parameters import Parameters
from zoext.directions import Direction, Frame, Terms, Window
from zoext.updates.base import Move, State, Update, of_each

#: The least float32 that is not subnormal: a smaller eps could be taken for zero.
LEAST_EPS = torch.finfo(torch.float32).tiny
LARGEST_EPS = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class AdamReplay(Update):
    """Adam over the last ``horizon`` gradient estimates (AdaMeZO, arXiv 2605.00650, section 3).

        m = (1 - b1) sum_lag b1^lag g_lag,   v = (1 - b2) sum_lag b2^lag g_lag^2,   lag = 0 .. n - 1
        theta <- theta - lr m / sqrt(v + eps) - lr weight_decay theta

    with n = min(step, horizon), so that the first steps have a shorter window and are otherwise alike.
    ``g_lag`` is the whole gradient estimate of a step, whatever the number of its terms. It is never
    stored: the update draws the directions of the window again, element by element in registers. Terms
    whose loss was not finite enter the window as zero; a step without any other moves nothing.

    Args:
        betas: (b1, b2), each in [0, 1). b2 = 0 means momentum only: theta <- theta - lr m.
        horizon: steps in the window; an update draws ``horizon`` numbers an element.
        eps: added to v under the root, in units of a squared gradient.
        bias_correction: divide m and v by the mass that the window holds, 1 - b^n. False is the printed
            form, whose step at b2 = .999 and horizon 10 is 6.5 times too long.

    Raises:
        ValueError: for arguments out of range.
    """

    betas: tuple[float, float] = (0.7, 0.9)
    horizon: int = 10
    eps: float = 1e-8
    bias_correction: bool = True

    def __post_init__(self) -> None:
        betas = tuple(self.betas) if isinstance(self.betas, tuple | list) else ()
        if len(betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), not {self.betas!r}")
        object.__setattr__(self, "betas", betas)
        if not isinstance(self.horizon, int) or isinstance(self.horizon, bool) or self.horizon < 1:
            raise ValueError(f"horizon must be an integer of at least 1, not {self.horizon!r}")
        if not isinstance(self.eps, int | float) or not LEAST_EPS <= self.eps <= LARGEST_EPS:
            raise ValueError(
                f"eps must be a float from {LEAST_EPS:.3g} to {LARGEST_EPS:.3g}, not {self.eps!r}"
            )
        object.__setattr__(self, "eps", float(self.eps))

    def apply(
        self, direction: Direction, parameters: Parameters, moves: Sequence[Move], state: State
    ) -> State:
        past = list(state.get("window", ()))
        history = past + [_plain(move.terms, parameters) for move in moves]
        counts = [min(len(past) + number, self.horizon) for number in range(1, len(moves) + 1)]
        # Where windows are shorter at the beginning, steps that contribute nothing precede the first one.
        rows = len(moves) - 1 + counts[-1]
        window, missing = history[-rows:], max(rows - len(history), 0)
        device = moves[0].terms.seeds.device
        momentum_only = self.betas[1] == 0
        eps = torch.full((), 1.0 if momentum_only else self.eps, dtype=torch.float32, device=device)
        first, second = (self._weights(beta, counts, device) for beta in self.betas)
        if momentum_only:
            second = torch.zeros_like(second)
        lr, decay = of_each([_lr(move) for move in moves]), of_each([move.decay for move in moves])
        for positions, took_part in _by_history(parameters, window):
            steps = [_terms(step, took) for step, took in zip(window, took_part, strict=True)]
            steps = [_terms(window[0], False)] * missing + steps
            these = parameters if len(positions) == len(parameters) else parameters.take(positions)
            direction.adam_(these, Window(steps, first, second), lr, eps, decay)
        return {"window": history[-self.horizon :]}

    def _weights(self, beta: float, counts: Sequence[int], device: torch.device) -> Tensor:
        """``(1 - beta) beta^lag`` for lag = count - 1 .. 0, divided by their sum if corrected.

        A row for each count, [H] for a single one; those of a shorter window stand at its end.
        """
        weights = torch.zeros((len(counts), counts[-1]), dtype=torch.float32, device=device)
        for row, count in zip(weights, counts, strict=True):
            mass = 1 - beta**count if self.bias_correction else 1.0
            for lag in range(count):  # fill_ passes the value with the launch: no copy to wait for
                row[counts[-1] - 1 - lag].fill_((1 - beta) * beta**lag / mass)
        return weights[0] if len(counts) == 1 else weights


def _lr(move: Move) -> Tensor:
    # Where some samples of a step were finite they count; where none was, momentum is not to move theta.
    moves = move.estimate.finite | (move.terms.coefficients != 0).any()
    return moves * torch.as_tensor(move.lr, dtype=torch.float32)


def _by_history(
    parameters: Parameters, window: Sequence[Mapping[str, Any]]
) -> Iterable[tuple[list[int], tuple[bool, ...]]]:
    """Positions of parameters, by the steps of the window in which they moved: mostly all in all.

    One that was frozen then was not displaced, so that those steps tell nothing of its gradient.
    """
    moved = [set(step["keys"]) for step in window]
    histories: dict[tuple[bool, ...], list[int]] = {}
    for position, key in enumerate(parameters.keys):
        histories.setdefault(tuple(key in keys for keys in moved), []).append(position)
    return [(positions, history) for history, positions in histories.items()]


def _plain(terms: Terms, parameters: Parameters) -> dict[str, Any]:
    """The terms of a step and the keys of what they moved, as plain data for ``state_dict``."""
    step: dict[str, Any] = {
        "seeds": terms.seeds,
        "coefficients": terms.coefficients,
        "keys": list(parameters.keys),
    }
    for side in ("left", "right"):
        if factors := getattr(terms.frame, side):
            step[side] = dict(factors)
    return step


def _terms(step: Mapping[str, Any], took_part: bool) -> Terms:
    frame = Frame(left=step.get("left", {}), right=step.get("right", {}))
    coefficients = step["coefficients"] if took_part else torch.zeros_like(step["coefficients"])
    return Terms(step["seeds"], coefficients, frame)
