"""The base class of directions, and the frame that the directions of a step share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from zoext._parameters.parameters import Parameters
from zoext.ops import Rule


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The factors that the directions of a step have in common.

    For each matrix (m x n) with low-rank directions, the frame maps the key of its parameter to the factor
    that is not drawn from the seed of a term: float32 [rank, n] in ``right``, or [rank, m] in ``left``. A
    parameter [entries, m, n] that is a stack of matrices has a factor for each, [entries, rank, n or m].
    ``unused`` has the keys of the weights that the forward behind the frame did not use, whose directions are
    zero. All other parameters have dense directions.
    """

    left: Mapping[int, Tensor] = field(default_factory=dict)
    right: Mapping[int, Tensor] = field(default_factory=dict)
    unused: frozenset[int] = frozenset()

    def holds(self, key: int) -> bool:
        """Whether the directions of the parameter ``key`` have low rank."""
        return key in self.left or key in self.right

    def kind(self, key: int) -> str:
        """Which directions the parameter ``key`` has: "left", "right" (its factor), "unused" or "dense"."""
        if key in self.left:
            return "left"
        if key in self.right:
            return "right"
        return "unused" if key in self.unused else "dense"


class Drawn(NamedTuple):
    """The factor of a matrix, float32 [K, rank, m or n], and the seeds it was drawn from."""

    seeds: Tensor  # kept, so that no other tensor has their address
    version: int
    factor: Tensor

    def is_of(self, seeds: Tensor) -> bool:
        """Whether seeds are the same. Their values are not compared, which would wait for the device."""
        same = seeds is self.seeds or (seeds.data_ptr(), len(seeds)) == (
            self.seeds.data_ptr(),
            len(self.seeds),
        )
        return same and seeds._version == self.version


@dataclass(frozen=True, slots=True)
class Terms:
    """``sum_k coefficients[k] D(seeds[k])``: int64 [K], float32 [K], in one frame, or two by ``plus``."""

    seeds: Tensor
    coefficients: Tensor
    frame: Frame
    joined: tuple[Frame, ...] = ()
    #: What theta lacks of matrices in the frame, ``held^T R``, by key: float32 [rank, m]; see ``defers``.
    held: Mapping[int, Tensor] = field(default_factory=dict)
    #: Keeps factors that were drawn from the seeds for the other probes of a step; None to draw them again.
    drawn: dict[int, Drawn] | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return self.seeds.numel()

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The frame of each term."""
        return self.joined or (self.frame,) * len(self)

    def plus(self, other: Terms) -> Terms:
        """The sum; terms are merged if the host can tell that they have the same directions."""
        if self.seeds is other.seeds and self.frames == other.frames:
            return replace(self, coefficients=self.coefficients + other.coefficients)
        seeds = torch.cat((self.seeds, other.seeds))
        coefficients = torch.cat((self.coefficients, other.coefficients))
        return Terms(seeds, coefficients, self.frame, self.frames + other.frames)


@dataclass(frozen=True, slots=True)
class Window:
    """The gradient estimates of some steps, oldest first, and their weights in the moments m and v.

    With ``g_h`` the sum of ``steps[h]``, ``m = sum_h first_weights[h] g_h``; the rule defines how the
    second weights enter v. The weights are float32 [H].

    There can also be S windows, each of which ends one step later than the previous one, over S + H - 1
    steps. The weights are then float32 [S, H].
    """

    steps: Sequence[Terms]
    first_weights: Tensor
    second_weights: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """The step for which a frame is made: the parameters that move, and the seed of the frame.

    ``seed`` is int64 [1] on their device: that of draw 0 of the step that ``Direction.origin`` returns.
    ``is_part`` tells whether other processes see other parts of the batch.
    """

    seed: Tensor
    groups: Sequence[Parameters]
    is_part: bool = False


class Observer(Protocol):
    """Makes the frame of a step from a forward at theta.

    ``frame`` is the frame of this process alone. Processes with parts of a batch exchange ``uses``. Where
    these tell that a parameter has a factor, it is ``merged`` from the ``sketch`` of each process.
    """

    def watching(self) -> AbstractContextManager[None]:
        """Context manager to run that forward in."""

    @property
    def ran_uncompiled(self) -> bool:
        """Whether that forward ran compiled code as it is written, whose losses are rounded differently."""

    def frame(self) -> tuple[Frame, Tensor]:
        """The frame, and ``finite``."""

    @property
    def finite(self) -> Tensor:
        """Whether the values that the frame is computed from were finite (bool [])."""

    @property
    def uses(self) -> Mapping[int, Set[str]]:
        """How the forward used each parameter that may have a factor, by key.

        "left" and "right" are the factors that it determined, and "other" is anything else. The keys and
        their order are the same in all processes, and ``kind_of`` tells which directions follow.
        """

    def sketch(self, key: int, side: str) -> Tensor:
        """What the forward tells of a factor: float32 [rows, d], or [entries, rows, d] for a stack.

        The shape is the same in all processes. Zeros if the forward did not determine the factor.
        """

    def merged(self, sketches: Tensor) -> tuple[Tensor, Tensor]:
        """The factor that follows from the sketches of all processes, stacked, and whether it is finite."""


class Direction(ABC):
    """How the entries of ``D(s)`` are drawn from seed ``s``."""

    #: Whether ``observer`` makes the frame of a step from a forward, so that the frame depends on data.
    watches: ClassVar[bool] = False

    @property
    def defers(self) -> bool:
        """Whether steps of the matrices in a frame are held back, as a sum, until the frame changes."""
        return False

    @abstractmethod
    def axpy_(self, parameters: Parameters, steps: Sequence[Terms], decay: Tensor | None = None) -> None:
        """``theta += sum_k c_k D(s_k) - decay * theta``, in place, one step after another.

        ``decay`` is float32 [S], or [] for a single step.
        """

    @abstractmethod
    def copy_(self, out: Sequence[Tensor], parameters: Parameters, terms: Terms) -> None:
        """``out = theta + sum_k c_k D(s_k)``; theta is only read."""

    def prepare(self, parameters: Parameters, terms: Terms) -> None:  # noqa: B027
        """Draws into ``terms.drawn`` at once what ``copy_`` would draw for one module after the other."""

    def copies_(self, out: Sequence[Tensor], parameters: Parameters, terms: Terms) -> None:
        """``out[c] = theta + sum_k coefficients[c, k] D(s_k)``, [C, *shape] each; theta is only read.

        The coefficients of ``terms`` are [C, K]. Each copy has the bits that ``copy_`` gives.
        """
        for copy, coefficients in enumerate(terms.coefficients):
            own = replace(terms, coefficients=coefficients)
            self.copy_([each[copy] for each in out], parameters, own)

    @abstractmethod
    def window_(
        self, parameters: Parameters, window: Window, rule: Rule, lr: Tensor, eps: Tensor, decay: Tensor
    ) -> None:
        """``theta += move - decay * theta``, in place, where ``rule`` computes the move from a window.

        ``lr``, ``eps`` and ``decay`` are float32 []; ``lr`` and ``decay`` are [S] for S windows, which
        are applied one after another.
        """

    def check(self, module: nn.Module | None, groups: Sequence[Parameters]) -> None:  # noqa: B027
        """Raises a ValueError for a model that these directions do not support."""

    def origin(self, number: int) -> int:
        """The number of the step from whose seed the frame of step ``number`` is drawn."""
        return number

    def frame(self, step: Step) -> Frame:
        """The frame of a step, for directions that need no forward to make it."""
        return Frame()

    def observer(self, module: nn.Module | None, step: Step) -> Observer | None:
        """An observer that makes the frame from a forward at theta; None if ``frame`` makes it."""
        return None

    def factors(self, parameters: Parameters, terms: Terms) -> tuple[list[Tensor], list[Tensor]]:
        """Left ([T or 1, rank, m]) and right ([T or 1, rank, n]) factors of each term of each parameter.

        Raises:
            ValueError: for parameters whose directions have no factors.
        """
        raise ValueError(
            f"direction: {type(self).__name__} has no factors; use LowRank or ActivationSubspace"
        )

    def step_scale(self, factor: Tensor) -> float:
        """What the coefficients of a gradient estimate are multiplied by, for a matrix with this factor."""
        return 1.0

    def gradient(self, terms: Terms) -> Terms:
        """The terms of the gradient estimate, from projected gradients along ``D(s_k)``."""
        return terms


@dataclass(frozen=True, slots=True)
class Combination:
    """``sum_k c_k D(s_k)``, with separate coefficients for each group of parameters.

    For several copies of the model at once, the coefficients of the terms are [C, K], a row for each copy.
    """

    direction: Direction
    seeds: Tensor
    terms: tuple[tuple[Parameters, Terms], ...]

    def of_copies(self) -> Combination:
        """The same for one copy, with coefficients [1, K]."""
        rows = tuple(
            (parameters, replace(terms, coefficients=terms.coefficients.unsqueeze(0)))
            for parameters, terms in self.terms
        )
        return replace(self, terms=rows)

    def __len__(self) -> int:
        return self.seeds.numel()


def rectangle(steps: Sequence[Terms]) -> tuple[Tensor, Tensor]:
    """Seeds (int64 [S, K]) and coefficients (float32 [S, K]), with K the largest number of terms.

    Shorter steps are padded with coefficients of zero, whose terms the operators skip.
    """
    longest = max(map(len, steps))
    seeds = [_filled_up(step.seeds, longest) for step in steps]
    coefficients = [_filled_up(step.coefficients, longest) for step in steps]
    return torch.stack(seeds), torch.stack(coefficients)


def _filled_up(terms: Tensor, count: int) -> Tensor:
    return terms if len(terms) == count else pad(terms, (0, count - len(terms)))


def terms_of(steps: Sequence[Terms]) -> tuple[Tensor, Tensor]:
    """Seeds and coefficients for ``axpy_``: [K] for a single step, else [S, K]."""
    return (steps[0].seeds, steps[0].coefficients) if len(steps) == 1 else rectangle(steps)


def decay_of(steps: Sequence[Terms], decay: Tensor | None) -> Tensor:
    """The decay of each step; zeros for None."""
    if decay is not None:
        return decay
    return torch.zeros(len(steps), dtype=torch.float32, device=steps[0].seeds.device)
