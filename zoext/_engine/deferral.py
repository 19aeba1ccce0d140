"""Low-rank steps that are held back: their sums, and who has them written to theta."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from zoext._engine.held import Held, listed, report
from zoext._engine.looks import Hooks
from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._runtime import interrupts
from zoext._runtime.devices import moved
from zoext._runtime.notices import warn
from zoext.directions import Direction, Drawn, Frame, Terms
from zoext.distributed import Sharing
from zoext.probes import Probe
from zoext.updates import GroupStep, LinearUpdate, State


class Run(Protocol):
    """The state of a run, as far as it concerns forwards and sums."""

    #: How often sums were changed.
    sums_changed: int

    @property
    def is_estimating(self) -> bool:
        """Whether a closure is running."""


class Recorded(Protocol):
    """A step of a recorded run."""

    @property
    def merged(self) -> bool:
        """Whether a look wrote what was held since the step before."""


AnyStep = TypeVar("AnyStep", bound=Recorded)


class _Product(NamedTuple):
    """What a step adds to the sum of a matrix: ``terms`` in order, float32 [rank, m] each."""

    matrices: Parameters
    position: int
    sum: Tensor  # its memory
    right: Tensor
    terms: list[Tensor]


#: Those that hold something. A probe of another optimizer looks at their weights.
_HOLDING: weakref.WeakSet[Deferral] = weakref.WeakSet()


class Deferral:
    """Holds back the steps of matrices whose directions share a factor, ``theta + sum^T V``.

    ``merge`` writes the sums. It is called before the factor changes, and by whoever looks: hooks on the
    modules that own the matrices, and on those above, merge before a forward that is no probe, and before
    weights are saved, loaded or copied. They act while something is held.

    A look within an interval changes how later steps are rounded: trajectories record it, and ranks must have
    it alike.

    Args:
        direction: if it does not defer, nothing is ever held.
        module: the model; known if the direction defers.
        run: tells whether a forward is a probe.

    Attributes:
        drawn: the factors that the probes of the step have drawn, see ``Terms.drawn``.
    """

    def __init__(self, direction: Direction, module: nn.Module | None, run: Run) -> None:
        self.direction = direction
        self._module = module
        self._run = run
        self._held: dict[int, Held] = {}
        self._buffers: dict[int, Tensor] = {}  # the memory of all sums so far, which graphs write to
        self._seed: Tensor | None = None  # of the last step that is held, int64 [1]
        self._interval: tuple[int, int] | None = None  # the run seed and the origin of what is held
        self._hooks = Hooks()
        self._was_merged = False  # by a look, since the last step
        self._continues = False  # a recording, in which a merge is at this place
        self._looks = 0  # steps that followed a look
        self.drawn: dict[int, Drawn] = {}

    @property
    def looks(self) -> int:
        """A number that is the same on ranks with the same looks between their steps."""
        return 2 * self._looks + self._was_merged

    def forget_looks(self) -> None:
        """Called after a state was loaded, on all ranks."""
        self._looks, self._was_merged = 0, False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._held

    @property
    def sums(self) -> Mapping[int, Tensor]:
        """What is held of each matrix by its key, float32 [rank, m]."""
        return {key: held.sum for key, held in self._held.items()}

    def fresh(self, run: Run) -> Deferral:
        """Merges, and returns one for a copy of the optimizer."""
        self._merge(leave_hooks=True)
        return Deferral(self.direction, self._module, run)

    def holds_any(self, weights: Set[int]) -> bool:
        """Whether one of the weights with these ids lacks something."""
        return any(id(held.owner) in weights for held in self._held.values())

    def begin(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Called before the probes of a step; writes what is held if its directions have another factor."""
        self._merge_others(groups)
        if any(held.notice_writes() for held in self._held.values()):
            self.merge()
        if self.direction.defers:
            check_groups(self.direction, groups)
            self._enter(groups[0]["seed"], groups[0]["step"])

    def look(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Merges what the weights lack, for other optimizers as well; called before they are read."""
        self._merge_others(groups)
        self.merge()

    def _merge_others(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for other in [each for each in _HOLDING if each is not self]:
            seen = {id(tensor) for group in groups for tensor in group["params"]}
            seen.update(self._in_module())
            if other.holds_any(seen):
                other.merge()

    def between_merges(
        self, steps: Sequence[AnyStep], groups: Sequence[Mapping[str, Any]]
    ) -> Iterator[Sequence[AnyStep]]:
        """Recorded steps in the pieces between merges, and merges before each piece as the run did.

        The caller applies each piece before it asks for the next one.
        """
        if not self.direction.defers:
            yield steps
            return
        seed, number, start = groups[0]["seed"], groups[0]["step"], 0
        for index, step in enumerate(steps):
            if step.merged or (seed, self.direction.origin(number + index)) != self._interval:
                if start < index:
                    yield steps[start:index]
                start = index
                self.merge()
                self._enter(seed, number + index)
        yield steps[start:]

    def count(self, seeds: Tensor) -> bool:
        """Called after a step with these seeds; returns whether a look had merged before it."""
        if self._held and len(seeds):
            self._seed = seeds[:1]
        self.drawn = {}
        was_merged, continues = self._was_merged, self._continues
        self._looks += was_merged
        self._was_merged = self._continues = False
        return was_merged or continues

    def begin_recording(self, groups: Sequence[Mapping[str, Any]], *, continues: bool) -> None:
        """Merges; ``continues`` a recording, in which the next step then follows a merge."""
        self.look(groups)
        step = groups[0]["step"]
        self._continues = continues and self.direction.defers and self.direction.origin(step) != step

    def _enter(self, seed: int, step: int) -> None:
        origin = self.direction.origin(step)
        if (seed, origin) != self._interval:
            self.merge()
            self._interval = seed, origin
        if origin == step:
            self._was_merged = self._continues = False  # the number of the step tells it

    def apply(
        self,
        update: LinearUpdate,
        parameters: Parameters,
        steps: Sequence[tuple[GroupStep, Frame]],
        state: State,
    ) -> State:
        """Applies steps to the dense parameters of a group, and adds them to the sums of its matrices."""
        for step, frame in steps:
            held = [position for position, key in enumerate(parameters.keys) if frame.holds(key)]
            written = [position for position in range(len(parameters)) if position not in held]
            terms = replace(update.terms(step), frame=frame, drawn=self.drawn)
            # Before anything moves, because memory may run out here.
            products = self._products(parameters.part(held), terms) if held and len(terms.seeds) else []
            if written:
                state = update.apply(self.direction, parameters.part(written), [step], state)
            if products:
                self._add(products, terms.seeds)
        return state

    def _products(self, matrices: Parameters, terms: Terms) -> list[_Product]:
        lefts, rights = self.direction.factors(matrices, terms)
        places: dict[tuple[torch.device, float], list[int]] = {}
        for position, right in enumerate(rights):
            places.setdefault((right.device, self.direction.step_scale(right)), []).append(position)
        products = []
        for (device, scale), positions in places.items():
            scaled = moved(terms.coefficients, device) * scale
            columns = [
                torch._foreach_mul([lefts[position][number] for position in positions], factor)
                for number, factor in enumerate(scaled.unbind())
            ]
            for position, *added in zip(positions, *columns, strict=True):
                memory = self._memory_like(matrices.keys[position], added[0])
                products.append(_Product(matrices, position, memory, rights[position], added))
        return products

    def _add(self, products: Sequence[_Product], seeds: Tensor) -> None:
        self._run.sums_changed += 1
        if self._seed is None:  # later steps may be replayed from a graph: ``count`` knows their seeds
            self._seed = seeds[:1]
        is_new = False
        for product in products:
            key = product.matrices.keys[product.position]
            if key not in self._held:
                own = product.matrices.take([product.position])
                self._held[key] = Held(own, product.sum.zero_(), product.right)
                is_new = True
        sums = [self._held[product.matrices.keys[product.position]].sum for product in products]
        for terms in zip(*(product.terms for product in products), strict=True):
            torch._foreach_add_(sums, terms)
        _HOLDING.add(self)
        if is_new and self._module is not None:
            self._hooks.install(self, self._module, {id(held.owner) for held in self._held.values()})

    def _memory_like(self, key: int, factor: Tensor) -> Tensor:
        known = self._buffers.get(key)
        if known is None or known.shape != factor.shape or known.device != factor.device:
            known = self._buffers[key] = torch.empty_like(factor)
        return known

    @contextmanager
    def probing(self) -> Iterator[None]:
        """The block of a closure. Probes leave the weights as they were, and autograd is told of writes."""
        for held in self._held.values():
            held.notice_writes()
        try:
            yield
        finally:
            for held in self._held.values():
                held.excuse_writes()

    def merge(self, *, loads: bool = False) -> None:
        """Writes what is held to theta, and holds nothing then.

        A weight that somebody else wrote to meanwhile keeps what was written, and a warning tells so.

        Args:
            loads: whether other weights are loaded next, which needs no error.

        Raises:
            RuntimeError: for weights that cannot take their steps any more. The others have theirs.
        """
        self._merge(loads=loads)

    def _merge(self, *, loads: bool = False, leave_hooks: bool = False) -> None:
        seed = self._seed
        if seed is None or not self._held:
            return
        lost, written, replaced = [], [], []
        inside = self._in_module()
        self._was_merged = True
        with torch.inference_mode(False), torch.no_grad(), interrupts.deferred():
            while self._held:
                key, held = next(iter(self._held.items()))
                if held.notice_writes():
                    written.append(held.name)
                elif not held.write(seed):
                    lost.append(held.name)
                elif id(held.owner) not in inside:
                    replaced.append(held.name)
                held.sum.zero_()  # an open round adds it to what it displaces
                del self._held[key]
        self._seed = None
        _HOLDING.discard(self)
        if leave_hooks:
            self._hooks.silence()
        else:
            self._hooks.remove()
        report(lost, written, replaced, loads)

    def _in_module(self) -> set[int]:
        """The ids of the parameters of the module."""
        return set(map(id, self._module.parameters())) if self._module is not None else set()

    def merge_outside(self) -> None:
        """``merge``, for those who must not be in a closure.

        Raises:
            RuntimeError: within one.
        """
        if self._run.is_estimating:
            raise RuntimeError(
                "weights are read within a closure, where they lack steps that defer=True holds back; do so "
                "between steps"
            )
        self.merge()

    # Called by the hooks

    def look_at(self, *, loads: bool) -> None:
        if not self._run.is_estimating:
            self.merge(loads=loads)

    def copied(self, copies: dict[int, Any]) -> None:
        if self._run.is_estimating:
            return
        lacking = [held.owner for held in self._held.values() if id(held.owner) in copies]
        self._merge(leave_hooks=True)
        with torch.no_grad():
            for owner in lacking:
                copies[id(owner)].detach().copy_(owner.detach())

    def pickled(self, *, is_late: bool) -> None:
        if self._run.is_estimating:
            return
        names = [held.name for held in self._held.values()] if is_late else []
        self._merge(leave_hooks=True)
        if names:
            warn(
                f"pickle: a module was pickled that owns one of {listed(names)}, and may lack the steps "
                "there that defer=True held back: pickle writes parameters first. torch.save writes values "
                "last and has them; for pickle itself call optimizer.merge() before"
            )


def merge_all(weights: Iterable[Tensor]) -> None:
    """Writes what any optimizer holds of these weights; called before they are read without a forward.

    Raises:
        RuntimeError: within a closure of such an optimizer.
    """
    ids = set(map(id, weights))
    for each in [each for each in _HOLDING if each.holds_any(ids)]:
        each.merge_outside()


def check(direction: Direction, probe: Probe, ranks: Sharing) -> None:
    """Raises a ValueError for a probe or ranks that do not fit a direction that defers."""
    if not direction.defers:
        return
    if not probe.displaces_held or getattr(probe, "module", None) is None:
        raise ValueError(
            f"probe: {type(probe).__name__} does not add the steps that defer=True holds back; pass the "
            "module with probe='streamed' or 'batched', or defer=False"
        )
    if ranks.waits_for_losses:
        raise ValueError(
            "process_group: a member that joins an ElasticGroup gets weights without the steps that "
            "defer=True holds back; pass a ProcessGroup, or defer=False"
        )


def check_groups(direction: Direction, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises a ValueError for weight decay, which takes a pass over theta in every step, and for shards."""
    for group in groups if direction.defers else ():
        if any(map(shards.is_distributed, group["params"])):
            raise ValueError(
                "params: there are DTensors, and defer=True holds back the steps of whole matrices only; "
                "pass defer=False"
            )
        if group["weight_decay"] != 0:
            raise ValueError(
                f"weight_decay must be 0 with defer=True, not {group['weight_decay']!r}: decay writes all "
                "weights in every step"
            )
