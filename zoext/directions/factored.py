"""Low-rank directions for matrices: one factor from the seed, the other from the frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from zoext import ops
from zoext._parameters.parameters import Parameters
from zoext._parameters.shards import matrix_shape
from zoext._runtime.devices import moved
from zoext._runtime.notices import warn
from zoext.directions._parts import parts
from zoext.directions._stacks import Matrix, factors_of, is_kept, matrices_of, operands
from zoext.directions.base import Direction, Frame, Terms, Window, decay_of, rectangle, terms_of
from zoext.directions.dense import Gaussian

_DENSE = Gaussian()


class _Kinds(NamedTuple):
    """The positions of parameters by the kind of their directions."""

    dense: list[int]
    matrices: list[int]
    unused: list[int]


class _Split:
    """Parameters by the kind of their directions; None where there are none."""

    def __init__(self, parameters: Parameters, kinds: _Kinds, *, has_stacks: bool) -> None:
        self.kinds = kinds
        self.dense, self.matrices, self.unused = (
            parameters.take(positions) if positions else None for positions in kinds
        )
        self._has_stacks = has_stacks
        self._matrices: list[Matrix] | None = None

    def matrices_of(self, frames: Sequence[Frame]) -> list[Matrix]:
        if self._matrices is None or self._has_stacks:
            assert self.matrices is not None
            self._matrices = matrices_of(self.matrices, frames)
        return self._matrices


class Factored(Direction):
    """``D(s) = L^T R`` for the matrices in the frame, dense normals for all other parameters.

    The factor that is not in the frame has standard normal entries, drawn from the seed.
    """

    #: Scale of the dense directions; with 0 their parameters do not move at all, not even by decay.
    dense_scale: float = 1.0

    def axpy_(self, parameters: Parameters, steps: Sequence[Terms], decay: Tensor | None = None) -> None:
        # A step without terms only decays theta, which needs no factors.
        frames = [step.frame for step in steps if len(step)]
        if _changes_kind(parameters, frames):
            for number, step in enumerate(steps):
                self.axpy_(parameters, [step], decay if decay is None else decay[number])
            return
        split = _split(parameters, frames)
        if split.dense is not None and self.dense_scale:
            _DENSE.axpy_(split.dense, [self._of_dense(step) for step in steps], decay)
        if split.unused is not None:
            _DENSE.axpy_(split.unused, [_nothing(step) for step in steps], decay)
        if (these := split.matrices) is not None:
            seeds, coefficients = terms_of(steps)
            of_terms = [frame for step in steps for frame in _filled_up(step, seeds.shape[-1])]
            given = operands(these, split.matrices_of(of_terms), seeds.flatten(), of_terms)
            decays = decay_of(steps, decay)
            for part in parts(given.tensors, given.spans):
                ops.factored_axpy_(
                    part.tensors,
                    part.rows_of(given.left, -1),
                    part.of(given.right),
                    part.here(seeds),
                    part.here(coefficients),
                    part.here(decays),
                    part.of(given.keys),
                    part.spans,
                    rounding=these.rounding,
                    residuals=part.rows_of(given.residuals),
                )

    def prepare(self, parameters: Parameters, terms: Terms) -> None:
        split = _split(parameters, [terms.frame] if len(terms) else [])
        if split.matrices is not None:
            matrices = list(filter(is_kept, split.matrices_of([terms.frame])))
            factors_of(split.matrices, matrices, terms.seeds, terms.frames, terms.drawn)

    def copy_(self, out: Sequence[Tensor], parameters: Parameters, terms: Terms) -> None:
        split = _split(parameters, [terms.frame] if len(terms) else [])
        kinds = split.kinds
        if split.dense is not None:
            _DENSE.copy_([out[i] for i in kinds.dense], split.dense, self._of_dense(terms))
        if split.unused is not None:
            _DENSE.copy_([out[i] for i in kinds.unused], split.unused, _nothing(terms))
        if split.matrices is not None:
            frames = [terms.frame] * len(terms)
            matrices = split.matrices_of(frames)
            given = operands(split.matrices, matrices, terms.seeds, frames, terms.drawn)
            seeds, coefficients = terms.seeds, terms.coefficients
            if terms.held:
                left = [
                    _with_held(factor, coefficients, terms.held.get(key))
                    for factor, key in zip(given.left, given.keys, strict=True)
                ]
                given = given._replace(left=left)
                seeds, coefficients = seeds[:1], torch.ones_like(coefficients[:1])
            to = [matrix.of(out[kinds.matrices[matrix.position]]) for matrix in matrices]
            for part in parts(given.tensors, given.spans, to):
                ops.factored_copy_(
                    part.out,
                    part.tensors,
                    part.rows_of(given.left, -1),
                    part.of(given.right),
                    part.here(seeds),
                    part.here(coefficients),
                    part.of(given.keys),
                    part.spans,
                )

    def copies_(self, out: Sequence[Tensor], parameters: Parameters, terms: Terms) -> None:
        split = _split(parameters, [terms.frame])
        dense = split.kinds.dense
        if split.dense is not None:
            _DENSE.copies_([out[i] for i in dense], split.dense, self._of_dense(terms))
        others = [i for i in range(len(parameters)) if i not in dense]
        if others:
            super().copies_([out[i] for i in others], parameters.take(others), terms)

    def window_(
        self, parameters: Parameters, window: Window, rule: ops.Rule, lr: Tensor, eps: Tensor, decay: Tensor
    ) -> None:
        kinds = _kinds(parameters, [step.frame for step in window.steps])
        if kinds.dense and self.dense_scale:
            scaled = self._window_of_dense(window, rule)
            _DENSE.window_(parameters.take(kinds.dense), scaled, rule, lr, eps, decay)
        if kinds.unused:
            nothing = replace(window, steps=[_nothing(step) for step in window.steps])
            _DENSE.window_(parameters.take(kinds.unused), nothing, rule, lr, eps, decay)
        if kinds.matrices:
            these = parameters.take(kinds.matrices)
            seeds, coefficients = rectangle(window.steps)
            frames = [step.frame for step in window.steps for _ in range(seeds.shape[1])]
            given = operands(these, matrices_of(these, frames), seeds.flatten(), frames)
            for part in parts(given.tensors, given.spans):
                ops.factored_window_(
                    part.tensors,
                    part.rows_of(given.left, -1),
                    part.of(given.right),
                    part.here(seeds),
                    part.here(coefficients),
                    part.here(window.first_weights),
                    part.here(window.second_weights),
                    part.here(lr),
                    part.here(eps),
                    part.here(decay),
                    part.of(given.keys),
                    part.spans,
                    rule=rule,
                    rounding=these.rounding,
                    residuals=part.rows_of(given.residuals),
                )

    def factors(self, parameters: Parameters, terms: Terms) -> tuple[list[Tensor], list[Tensor]]:
        split = _split(parameters, [terms.frame])
        kinds = split.kinds
        if kinds.dense:
            raise ValueError(
                f"direction: {parameters.names[kinds.dense[0]]} has dense directions, which have no factors; "
                "freeze it with requires_grad_(False)"
            )
        these = split.matrices if split.matrices is not None else parameters.take([])
        matrices = split.matrices_of(terms.frames) if kinds.matrices else []
        if stack := next((matrix for matrix in matrices if matrix.entry is not None), None):
            raise ValueError(
                f"direction: {these.names[stack.position]} is a stack of matrices with factors each; "
                "freeze it with requires_grad_(False)"
            )
        factors = factors_of(these, matrices, terms.seeds, terms.frames, terms.drawn)
        left, right = ([torch.zeros(0)] * len(parameters) for _ in range(2))
        for place, *found in zip(kinds.matrices, *factors, strict=True):
            left[place], right[place] = found
        for place in kinds.unused:
            shape = matrix_shape(parameters.blocks[place].shape)
            left[place], right[place] = (terms.coefficients.new_zeros((1, 1, length)) for length in shape)
        return left, right

    def _of_dense(self, terms: Terms) -> Terms:
        if self.dense_scale == 1:
            return terms
        return replace(terms, coefficients=terms.coefficients * self.dense_scale)

    def _window_of_dense(self, window: Window, rule: ops.Rule) -> Window:
        if self.dense_scale == 1:
            return window
        if rule is ops.Rule.SCALAR_ADAM:  # its v is of projected gradients, which dense_scale does not affect
            return replace(window, first_weights=window.first_weights * self.dense_scale)
        return replace(window, steps=[self._of_dense(step) for step in window.steps])


def write_product(parameters: Parameters, left: Tensor, right: Tensor, seed: Tensor) -> None:
    """``theta += left^T right`` for the only matrix in ``parameters``, rounded as they say.

    ``left`` is float32 [1, rank, m], ``right`` [1, rank, n]; bits of rounding come from ``seed``, int64 [1].
    """
    one = torch.ones(1, dtype=torch.float32, device=left.device)
    residuals = [
        residual.view_as(tensor) if residual.numel() else residual
        for residual, tensor in zip(
            parameters.residuals, parameters.tensors, strict=bool(parameters.residuals)
        )
    ]
    for part in parts(parameters.tensors, parameters.spans):
        ops.factored_axpy_(
            part.tensors,
            part.rows_of([left], -1),
            [right],
            part.here(seed),
            one,
            torch.zeros_like(one[0]),
            parameters.keys,
            part.spans,
            rounding=parameters.rounding,
            residuals=part.rows_of(residuals),
        )


def _with_held(left: Tensor, coefficients: Tensor, held: Tensor | None) -> Tensor:
    """The left factor of a sum of terms that share the right one, and of what is held: [1, rank, m]."""
    total = torch.zeros_like(left[0]) if held is None else held
    for factor, coefficient in zip(left, moved(coefficients, left.device), strict=True):
        total = total + factor * coefficient
    return total.unsqueeze(0)


def _filled_up(step: Terms, count: int) -> tuple[Frame, ...]:
    """The frame of each term of a step, padded to ``count`` terms."""
    return step.frames + (step.frame,) * (count - len(step))


def warn_of_narrow(rank: int, widths: Iterable[tuple[str, int]]) -> None:
    """Warns if some of the matrices, given by name and columns, are narrower than ``rank``."""
    narrow = [f"{name} ({columns})" for name, columns in widths if columns < rank]
    if narrow:
        shown = ", ".join(narrow[:3]) + (f" and {len(narrow) - 3} more" if len(narrow) > 3 else "")
        warn(
            f"rank={rank} is more than the columns of some matrices, whose directions have the rank of their "
            f"columns: {shown}"
        )


def _kinds(parameters: Parameters, frames: Sequence[Frame]) -> _Kinds:
    """Matrices are those that some frame holds; without frames all are dense."""
    kinds = _Kinds([], [], [])
    for position, key in enumerate(parameters.keys):
        if any(frame.holds(key) for frame in frames):
            kinds.matrices.append(position)
        elif any(key in frame.unused for frame in frames):
            kinds.unused.append(position)
        else:
            kinds.dense.append(position)
    return kinds


def _split(parameters: Parameters, frames: Sequence[Frame]) -> _Split:
    """The parameters by their kinds in the frames, which hardly ever change from step to step."""
    own = frames[:1] if all(frame is frames[0] for frame in frames) else frames
    key = tuple([frame.kind(key) for frame in own for key in parameters.keys])
    known: _Split | None = parameters.made.get(key)
    if known is None:
        has_stacks = any(len(block.shape) > 2 for block in parameters.blocks)
        known = _Split(parameters, _kinds(parameters, frames), has_stacks=has_stacks)
        parameters.remember(key, known)
    return known


def _changes_kind(parameters: Parameters, frames: Sequence[Frame]) -> bool:
    """Whether some parameter has directions of different kinds; zero ones count as low-rank ones."""
    if all(frame is frames[0] for frame in frames):
        return False
    for key in parameters.keys:
        kinds = {frame.kind(key) for frame in frames}
        if len(kinds - {"unused"}) > 1 or {"dense", "unused"} <= kinds:
            return True
    return False


def _nothing(terms: Terms) -> Terms:
    """The same terms with coefficients of zero: only rounding bits come from their seeds."""
    return Terms(terms.seeds, torch.zeros_like(terms.coefficients), Frame())
