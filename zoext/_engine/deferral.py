"""Low-rank steps that are held back: their sums, and who has them written to theta."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._runtime import interrupts
from zoext._runtime.devices import moved
from zoext.directions import Direction, Frame, Terms
from zoext.directions.factored import write_product
from zoext.distributed import Sharing
from zoext.probes import Probe
from zoext.updates import GroupStep, LinearUpdate, State


class Run(Protocol):
    """The state of a run, as far as it concerns forwards."""

    @property
    def is_estimating(self) -> bool:
        """Whether a closure is running."""


class Recorded(Protocol):
    """A step of a recorded run."""

    @property
    def merged(self) -> bool:
        """Whether a look wrote what was held since the step before."""


AnyStep = TypeVar("AnyStep", bound=Recorded)


class _Held(NamedTuple):
    """``sum^T right``, which the only matrix in ``parameters`` lacks."""

    parameters: Parameters
    sum: Tensor  # float32 [rank, m]
    right: Tensor  # float32 [1, rank, n]


#: Those that hold something. A probe of another optimizer looks at their weights.
_HOLDING: weakref.WeakSet[Deferral] = weakref.WeakSet()


class Deferral:
    """Holds back the steps of matrices whose directions share a factor, ``theta + sum^T V``.

    ``merge`` writes the sums. It is called before the factor changes, and by whoever looks: hooks on the
    modules that own the matrices merge before a forward that is no probe, and before their weights are
    saved or loaded. The hooks are there while something is held.

    A look within an interval changes how later steps are rounded: trajectories record it, and ranks must have
    it alike.

    Args:
        direction: if it does not defer, nothing is ever held.
        module: the model; known if the direction defers.
        run: tells whether a forward is a probe.
    """

    def __init__(self, direction: Direction, module: nn.Module | None, run: Run) -> None:
        self.direction = direction
        self._module = module
        self._run = run
        self._held: dict[int, _Held] = {}
        self._buffers: dict[int, Tensor] = {}  # the memory of all sums so far, which graphs write to
        self._seed: Tensor | None = None  # of the last step that is held, int64 [1]
        self._interval: tuple[int, int] | None = None  # the run seed and the origin of what is held
        self._hooks: list[RemovableHandle] = []
        self._was_merged = False  # by a look, since the last step
        self._continues = False  # a recording, in which a merge is at this place
        self._looks = 0  # steps that followed a look

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
        """One without sums, for a copy of the optimizer."""
        return Deferral(self.direction, self._module, run)

    def holds_any(self, weights: Set[int]) -> bool:
        """Whether one of the weights with these ids lacks something."""
        return any(id(held.parameters.owners[0]) in weights for held in self._held.values())

    def begin(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Called before the probes of a step; writes what is held if its directions have another factor."""
        self._merge_others(groups)
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
            seen.update(map(id, self._module.parameters() if self._module is not None else ()))
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
            if written:
                state = update.apply(self.direction, parameters.take(written), [step], state)
            terms = replace(update.terms(step), frame=frame)
            if held and len(terms.seeds):
                self._add(parameters.take(held), terms)
        return state

    def _add(self, matrices: Parameters, terms: Terms) -> None:
        factors = zip(matrices.keys, *self.direction.factors(matrices, terms), strict=True)
        for position, (key, left, right) in enumerate(factors):
            if key not in self._held:
                own = matrices.take([position])
                self._held[key] = _Held(own, self._zeros_like(key, left[0]), right)
            scaled = moved(terms.coefficients, left.device) * self.direction.step_scale(right)
            for factor, scale in zip(left, scaled, strict=True):
                self._held[key].sum.add_(factor * scale)
        if self._seed is None:  # later steps may be replayed from a graph: ``count`` knows their seeds
            self._seed = terms.seeds[:1]
        _HOLDING.add(self)
        self._install()

    def _zeros_like(self, key: int, factor: Tensor) -> Tensor:
        known = self._buffers.get(key)
        if known is None or known.shape != factor.shape or known.device != factor.device:
            known = self._buffers[key] = torch.empty_like(factor)
        return known.zero_()

    def merge(self) -> None:
        """Writes what is held to theta.

        Raises:
            RuntimeError: if a weight is in other memory than when its steps were taken.
        """
        if not self._held:
            return
        for held in self._held.values():
            if shards.part_of(held.parameters.owners[0]).data_ptr() != held.parameters.addresses[0]:
                raise RuntimeError(
                    f"{held.parameters.names[0]} was moved, cast or copied, and lacks the steps there that "
                    "defer=True holds back; call optimizer.merge() before"
                )
        assert self._seed is not None
        self._was_merged = True
        with torch.inference_mode(False), torch.no_grad(), interrupts.deferred():
            while self._held:
                key, held = next(iter(self._held.items()))
                write_product(held.parameters, held.sum.unsqueeze(0), held.right, self._seed)
                held.parameters.tell_autograd()
                held.sum.zero_()  # an open round adds it to what it displaces
                del self._held[key]
        self._seed = None
        self._remove()

    def _install(self) -> None:
        if self._hooks or self._module is None:
            return
        owners = {id(held.parameters.owners[0]) for held in self._held.values()}
        for part in self._module.modules():
            if owners.isdisjoint(map(id, part.parameters(recurse=False))):
                continue
            self._hooks += [
                part.register_forward_pre_hook(self._look),
                part.register_state_dict_pre_hook(self._look),
                part.register_load_state_dict_pre_hook(self._look),
            ]

    def _look(self, *_: Any) -> None:
        if not self._run.is_estimating:
            self.merge()

    def _remove(self) -> None:
        _HOLDING.discard(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


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
