"""The base class of updates that replay a window of gradient estimates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from zoext._parameters.parameters import Parameters
from zoext.directions import Direction, Frame, Terms, Window
from zoext.ops import Rule
from zoext.updates.base import GroupStep, State, Update, of_each

_SMALLEST_EPS = torch.finfo(torch.float32).tiny  # the smallest normal float32
_LARGEST_EPS = torch.finfo(torch.float32).max


class Weights(NamedTuple):
    """The weights of one window in the moments m and v, by lag: entry 0 is that of the newest estimate."""

    first: Sequence[float]
    second: Sequence[float]


class WindowUpdate(Update):
    """Applies a rule of the core to the last ``horizon`` gradient estimates.

    A subclass is a frozen dataclass that names its ``rule``, has a field ``horizon``, and computes the
    weights of a window in ``weights``. The state holds seeds and coefficients, never moments: the operators
    redraw the directions of the window. Terms whose loss was not finite enter the window as zero; a step
    without any other term moves nothing.
    """

    rule: ClassVar[Rule]
    horizon: int

    @abstractmethod
    def weights(self, count: int) -> Weights:
        """The weights of a window of ``count`` steps, 1 <= count <= horizon; ``count`` numbers each."""

    @property
    def kernel_eps(self) -> float:
        """The eps that is passed to the operators."""
        return 0.0

    def apply(
        self, direction: Direction, parameters: Parameters, steps: Sequence[GroupStep], state: State
    ) -> State:
        past = list(state.get("window", ()))
        history = past + [_plain(step.terms, parameters) for step in steps]
        counts = [min(len(past) + number, self.horizon) for number in range(1, len(steps) + 1)]
        # The first windows of a run are shorter: steps that contribute nothing are put before the first step.
        rows = len(steps) - 1 + counts[-1]
        window, missing = history[-rows:], max(rows - len(history), 0)
        if len(steps) > 1 and _changes_kind(window):  # which of its steps count depends on the step
            for step in steps:
                state = self.apply(direction, parameters, [step], state)
            return state
        device = steps[0].terms.seeds.device
        eps = torch.full((), self.kernel_eps, dtype=torch.float32, device=device)
        weights = [self.weights(count) for count in counts]
        first, second = (_right_aligned(rows, device) for rows in zip(*weights, strict=True))
        lr, decay = of_each([_lr(step) for step in steps]), of_each([step.decay for step in steps])
        for positions, took_part in _by_history(parameters, window):
            terms = [_terms(step, took) for step, took in zip(window, took_part, strict=True)]
            terms = [_terms(window[0], False)] * missing + terms
            these = parameters if len(positions) == len(parameters) else parameters.take(positions)
            direction.window_(these, Window(terms, first, second), self.rule, lr, eps, decay)
        return {"window": history[-self.horizon :]}


def decaying(beta: float, count: int, bias_correction: bool) -> list[float]:
    """``(1 - beta) beta^lag`` for lag = 0 .. count - 1, divided by their sum if corrected."""
    mass = 1 - beta**count if bias_correction else 1.0
    return [(1 - beta) * beta**lag / mass for lag in range(count)]


def check_beta(name: str, beta: object) -> None:
    if not isinstance(beta, int | float) or not 0 <= beta < 1:
        raise ValueError(f"{name} must be a number in [0, 1), not {beta!r}")


def checked_betas(betas: object) -> tuple[float, float]:
    pair = tuple(betas) if isinstance(betas, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in pair):
        raise ValueError(f"betas must be two numbers in [0, 1), not {betas!r}")
    return pair


def checked_eps(eps: object) -> float:
    """Rejects subnormal numbers as well, which a processor may flush to zero."""
    if not isinstance(eps, int | float) or not _SMALLEST_EPS <= eps <= _LARGEST_EPS:
        raise ValueError(f"eps must be a float from {_SMALLEST_EPS:.3g} to {_LARGEST_EPS:.3g}, not {eps!r}")
    return float(eps)


def _right_aligned(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """A row for each window, [H] for a single one, oldest step first; shorter windows are padded in front."""
    weights = torch.zeros((len(rows), len(rows[-1])), dtype=torch.float32, device=device)
    for row, values in zip(weights, rows, strict=True):
        for lag, value in enumerate(values):  # fill_ passes the value with the launch: no copy to wait for
            row[len(row) - 1 - lag].fill_(value)
    return weights[0] if len(rows) == 1 else weights


def _lr(step: GroupStep) -> Tensor:
    # If some samples of a step were finite, they count; if none was, momentum must not move theta.
    moves = step.estimate.finite | (step.terms.coefficients != 0).any()
    return moves * torch.as_tensor(step.lr, dtype=torch.float32)


def _by_history(
    parameters: Parameters, window: Sequence[Mapping[str, Any]]
) -> Iterable[tuple[list[int], tuple[bool, ...]]]:
    """Positions of parameters, grouped by the steps of the window that they count; usually one group.

    A parameter that was frozen in a step was not displaced, so the step has no estimate of its gradient.
    Steps in which its directions were of another kind than in the last step cannot be added to it.
    """
    moved = [set(step["keys"]) for step in window]
    frames = [_frame(step) for step in window] if _changes_kind(window) else []
    histories: dict[tuple[bool, ...], list[int]] = {}
    for position, key in enumerate(parameters.keys):
        history = tuple(key in keys for keys in moved)
        if frames:
            fits = _like_the_last([frame.kind(key) for frame in frames])
            history = tuple(took and fit for took, fit in zip(history, fits, strict=True))
        histories.setdefault(history, []).append(position)
    return [(positions, history) for history, positions in histories.items()]


def _changes_kind(window: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the directions of some parameters differ in kind between the steps."""
    frames = [_frame(step) for step in window]
    first = frames[0]
    return any(
        frame.left.keys() != first.left.keys()
        or frame.right.keys() != first.right.keys()
        or frame.unused != first.unused
        for frame in frames[1:]
    )


def _like_the_last(kinds: Sequence[str]) -> list[bool]:
    """Which steps have directions of the same kind as the last one; zero ones are low-rank ones."""
    if kinds[-1] == "dense":
        return [kind == "dense" for kind in kinds]
    side = next((kind for kind in reversed(kinds) if kind in {"left", "right"}), "unused")
    return [kind in {side, "unused"} for kind in kinds]


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
    if terms.frame.unused:
        step["unused"] = sorted(terms.frame.unused)
    return step


def _terms(step: Mapping[str, Any], took_part: bool) -> Terms:
    if took_part:
        return Terms(step["seeds"], step["coefficients"], _frame(step))
    return Terms(step["seeds"], torch.zeros_like(step["coefficients"]), Frame())


def _frame(step: Mapping[str, Any]) -> Frame:
    return Frame(step.get("left", {}), step.get("right", {}), frozenset(step.get("unused", ())))
