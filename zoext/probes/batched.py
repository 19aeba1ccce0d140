"""A probe that evaluates several probes in one forward of as many copies of the batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zoext._parameters import shards, wrappers
from zoext._parameters.parameters import Parameters
from zoext._runtime import interrupts
from zoext._runtime.arguments import check_count
from zoext._runtime.profiling import Phase, record
from zoext.directions import Combination
from zoext.probes._batched import isolation, layers
from zoext.probes._batched.block import Block, Way
from zoext.probes._batched.displacements import Displacements
from zoext.probes._batched.draws import EqualDraws
from zoext.probes._batched.errors import BatchedProbeError
from zoext.probes._batched.installed import installed
from zoext.probes._batched.observed import Observed, Own
from zoext.probes._owners import SEES_CLASSES
from zoext.probes._reads import ReadGuard
from zoext.probes._writes import WeightWriteError, refused
from zoext.probes.base import Probe, Session, is_watched_session

#: Calls the closure for a number of copies, with the state of the random generators that every probe starts
#: from.
Run = Callable[[], Any]


class BatchedProbe(Probe):
    """Evaluates the probes of a round in one forward, of a copy of the batch for each.

    The closure takes the number of copies and returns a loss for each of them:

        def closure(copies):
            outputs = model(**zoext.repeat(batch, copies))
            return zoext.mean_per_copy(losses_of(outputs), copies)

        optimizer = zoext.MeZO(model, probe="batched")
        optimizer.step(closure)

    Theta is only read. Where the direction of a matrix has factors (``LowRank``, ``ActivationSubspace``), a
    linear layer or an embedding adds ``c (x R) L^T`` to the output of each copy, so that no displaced weight
    exists and none is rounded. Where it is dense, the weights of all copies are made while the module runs,
    from one generation of the noise. Linear layers (``Conv1D`` of transformers too), embeddings and norms
    then run once for all copies; any other module runs copy by copy.

    Sessions 1, 2, 4, 8, ..., every 100th, and any in which other modules or more copies run than before,
    begin with two forwards at theta, which check that the copies do not see each other. Each step compares
    losses of equal batches with equal dropout masks, and tokens that ``torch.multinomial`` samples with equal
    random numbers.

    Args:
        module: the model.
        max_copies: the largest number of copies in a forward; a round with more probes takes several. None
            (default) means all probes of a round.

    Raises:
        ValueError: for ``max_copies`` below 1.
        TypeError: if a part of the model is compiled.
        BatchedProbeError: in a step, for a closure or a model whose copies cannot be told apart: modules that
            mix examples (batch normalization in training), dropout outside of ``nn.Dropout``, weights that
            are read while their module does not run, sharded weights, derivatives.
    """

    is_exact = True
    displaces_held = True

    def __init__(self, module: nn.Module, max_copies: int | None = None) -> None:
        if max_copies is not None:
            check_count("max_copies", max_copies)
        if wrappers.is_compiled(module):
            raise TypeError(
                "batched probe: a part of the module is compiled, and its code runs no other forwards; pass "
                "the module it was made from, or probe='inplace'"
            )
        self.module = module
        self.max_copies = max_copies
        self._observed: dict[nn.Module, Observed] = {}
        self._checked: set[tuple[tuple[int, bool], ...]] = set()
        self._checked_copies = 1
        self._seen: set[nn.Module] = set()
        self._routes: set[frozenset[nn.Module]] = set()  # the modules that ran in sessions with a check
        self._outermost: list[nn.Module] = [module]  # which the closure calls itself
        self._outline: list[tuple[int, list[int]]] = []
        self._samples = False  # whether the closure samples tokens
        self._sessions = 0
        self._last_route: frozenset[nn.Module] = frozenset()
        self._unknown: set[nn.Module] = set()  # of the last session
        self._signals = interrupts.Signals()
        self._modules: list[nn.Module] = []  # as of the beginning of the session
        self._known: list[Parameters] = []
        self._owned: dict[nn.Module, list[Own]] = {}
        self._factorable: frozenset[int] = frozenset()
        self._check_next = True
        self._read: set[int] = set()  # weights, while their modules did not run

    def __getstate__(self) -> dict[str, Any]:
        """Only the arguments; everything else is recomputed."""
        return {"module": self.module, "max_copies": self.max_copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def describe(self) -> str:
        how = "batched: the probes of a round run in one forward, each on a copy of the batch"
        apart = sorted(
            name
            for name, module in self.module.named_modules()
            if module in self._seen and layers.layer_of(module) is None
        )
        return f"{how}; copy by copy: {', '.join(apart)}" if apart else how

    @property
    def is_to_watch(self) -> bool:
        return self._check_next

    @contextmanager
    def captured(self) -> Iterator[list[Tensor]]:
        with self.unwatched():
            yield []
        if self._check_next:
            raise BatchedProbeError("other modules ran while the step was captured than in the steps before")

    @contextmanager
    def session(self) -> Iterator[BatchedSession]:
        self._modules = list(self.module.modules())
        self._forget_if_changed()
        if not self._unwatched:
            self._sessions += 1
            self._check_next = self._check_next or is_watched_session(self._sessions)
        with interrupts.deferred() as signals:
            self._signals = signals
            try:
                yield BatchedSession(signals, self)
            finally:
                torch.clear_autocast_cache()

    def _forget_if_changed(self) -> None:
        """Forgets everything if modules or their parameters were replaced."""
        outline = [(id(module), list(map(id, module._parameters.values()))) for module in self._modules]
        if outline != self._outline:
            self._outline, self._known, self._check_next = outline, [], True
            self._observed.clear()
            self._checked.clear()
            self._seen.clear()
            self._routes.clear()
            self._outermost, self._checked_copies = [self.module], 1

    def needs_check(self, combination: Combination, copies: int) -> bool:
        """Whether ``check`` must run before the copies are displaced."""
        self._update(combination)
        # One copy does not show where several lie, and few may fit where more do not.
        if self._modes() not in self._checked or copies > self._checked_copies:
            self._check_next = True
        return self.is_to_repeat()

    def is_to_repeat(self) -> bool:
        """Whether modules ran that no check has seen, so that the last probes must be evaluated again."""
        return self._check_next and not self._unwatched

    def accept(self) -> None:
        """Takes the modules that ran with displaced weights, right after a check, as checked.

        Raises:
            BatchedProbeError: if some of them did not run at theta.
        """
        if self._unknown:
            names = [name for name, module in self.module.named_modules() if module in self._unknown]
            raise BatchedProbeError(
                f"{', '.join(names[:3])} ran at displaced weights only, or with inputs of another kind than "
                "at theta, so that it is unknown where the copies lie; freeze it with requires_grad_(False)"
            )
        self._routes.add(self._last_route)
        self._check_next = False

    def _modes(self) -> tuple[tuple[int, bool], ...]:
        return tuple((id(module), module.training) for module in self._modules)

    def check(self, combination: Combination, copies: int, run: Run) -> None:
        """Runs the closure twice at theta and raises if its copies cannot be told apart."""
        for seen in self._observed.values():
            seen.forget()
        moving = [owner for parameters, _ in combination.terms for owner in parameters.owners]
        with isolation.Operators() as operators, EqualDraws(copies) as draws:
            before, block, assigned = self._at_theta(moving, copies, Way.OBSERVED, run)
        tolerance = isolation.tolerance_of(self.module)
        isolation.check_equal(before, operators.samples, tolerance)
        self._outermost = list(block.outermost)
        names = [name for name, module in self.module.named_modules() if module in block.visited]
        with EqualDraws(copies):
            after, _, others = self._at_theta(moving, copies, Way.ALTERED, run)
        isolation.check_apart(before, after, names, tolerance)
        isolation.check_assigned(assigned, others)
        self._seen |= block.visited
        self._routes.add(frozenset(block.visited))
        self._samples = self._samples or draws.has_drawn
        self._checked.add(self._modes())
        self._checked_copies, self._check_next = max(copies, self._checked_copies), False

    def _at_theta(
        self, moving: list[Tensor], copies: int, way: Way, run: Run
    ) -> tuple[Tensor, Block, dict[str, Tensor | None]]:
        guard = ReadGuard(self._note_read)
        block = Block(self.module, self._observed, copies, way, self._signals, guard)
        # What a session that is watched calls may be other modules than before.
        outermost = self._modules if way is Way.OBSERVED else self._outermost
        with isolation.unwritten_buffers(self.module) as assigned:
            try:
                with (
                    refused(self.module),
                    self._guarded(guard, moving, block, sees_gathered=True),
                    installed(outermost, self._modules, self._owned, block),
                ):
                    losses = losses_of(run())
            except (BatchedProbeError, WeightWriteError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if not block.spread:
                    raise
                names = ", ".join(block.name(module) for module in dict.fromkeys(block.spread))
                raise BatchedProbeError(
                    f"the input of {names} is the same for all copies, and the model cannot take its output "
                    "for each example; freeze it with requires_grad_(False)"
                ) from error
        if not block.visited:
            raise BatchedProbeError(
                "the closure ran no module that owns a weight of the optimizer, so nothing would be "
                "displaced; have it run that model itself, not a copy"
            )
        return losses, block, assigned

    def _note_read(self, weight: Tensor) -> None:
        self._read.add(id(weight))

    @contextmanager
    def _guarded(
        self, guard: ReadGuard, moving: list[Tensor], block: Block, *, sees_gathered: bool
    ) -> Iterator[None]:
        """A block that raises if a weight is read while its module does not run.

        Reads of weights that FSDP2 gathers are seen with ``sees_gathered``, at a price for every operator.
        """
        self._read.clear()
        is_gathered = sees_gathered and any(map(shards.is_distributed, moving))
        reads = isolation.GatheredReads(block.running) if is_gathered else nullcontext()
        guard.begin(moving)
        try:
            with reads as gathered:
                yield
        finally:
            guard.release(moving)
        names: list[str] = []
        if self._read:
            names += [name for name, weight in self.module.named_parameters() if id(weight) in self._read]
        if gathered is not None:
            names += [block.gathered[key] for key in gathered.read if key in block.gathered]
        if names:
            raise BatchedProbeError(
                f"{', '.join(names[:3])} {'is' if len(names) == 1 else 'are'} read while the module that "
                f"owns {'it' if len(names) == 1 else 'them'} does not run"
            )

    @contextmanager
    def displaced(self, combination: Combination, copies: int, *, is_checked: bool = True) -> Iterator[None]:
        """Runs modules with the weights of each copy within the block; coefficients are [C, K].

        The block raises if a weight is read while its module does not run.
        """
        self._update(combination)
        torch.clear_autocast_cache()
        if not len(combination):
            with record(Phase.FORWARD):
                yield
            return
        with record(Phase.PERTURB):
            weights = Displacements(combination, copies, self._factorable)
        guard = ReadGuard(self._note_read)
        block = Block(self.module, self._observed, copies, Way.DISPLACED, self._signals, guard, weights)
        moving = [owner for parameters, _ in combination.terms for owner in parameters.owners]
        with (
            isolation.unwritten(combination),
            self._guarded(guard, moving, block, sees_gathered=not is_checked),
            installed(self._outermost, self._modules, self._owned, block),
            EqualDraws(copies) if self._samples else nullcontext(),
            record(Phase.FORWARD),
        ):
            yield
        if not block.visited:
            raise BatchedProbeError("the closure ran no module that owns a weight of the optimizer")
        self._unknown = block.unknown | (block.visited - self._seen)
        self._last_route = frozenset(block.visited)
        if self._unknown or self._last_route not in self._routes:
            self._check_next = True

    def _update(self, combination: Combination) -> None:
        groups = [parameters for parameters, _ in combination.terms]
        if len(groups) == len(self._known) and all(map(operator.is_, groups, self._known)):
            return
        moving = {id(owner) for parameters in groups for owner in parameters.owners}
        self._owned = _owned(self.module, moving)
        found = {id(each.parameter) for own in self._owned.values() for each in own}
        for parameters in groups:
            for owner, name in zip(parameters.owners, parameters.names, strict=True):
                if id(owner) not in found:
                    raise BatchedProbeError(f"{name} is not a parameter of the module")
        self._factorable = _factorable(self._owned)
        self._known, self._check_next = groups, True


def losses_of(returned: Any) -> Tensor:
    """The losses [C] of what a closure returned: them, or them and their weight."""
    losses = returned[0] if isinstance(returned, tuple) else returned
    assert isinstance(losses, Tensor)
    losses = losses.detach()
    return losses if losses.is_floating_point() and losses.dim() else losses.float().reshape(-1)


class BatchedSession(Session):
    """The probes of one estimate, several in a forward."""

    def __init__(self, signals: interrupts.Signals, probe: BatchedProbe) -> None:
        super().__init__(signals)
        self._probe = probe

    @property
    def max_copies(self) -> int | None:
        return self._probe.max_copies

    @contextmanager
    def displaced(self, combination: Combination, keep_buffers: bool = False) -> Iterator[None]:
        """A block in which the caller runs the model on one batch, as for ask and tell."""
        with self._probe.displaced(combination.of_copies(), 1, is_checked=False):
            yield

    def losses(self, combination: Combination, copies: int, run: Run) -> Any:
        """What ``run``, which calls the closure, returns with the weights of each copy.

        ``combination`` has coefficients [C, K].
        """
        probe = self._probe
        is_checked = False
        while True:
            if len(combination) and probe.needs_check(combination, copies):
                probe.check(combination, copies, run)
                is_checked = True
            with probe.displaced(combination, copies):
                found = run()
            if not len(combination) or not probe.is_to_repeat():
                return found
            if is_checked:
                probe.accept()
                return found


def _owned(root: nn.Module, moving: set[int]) -> dict[nn.Module, list[Own]]:
    """The weights that move of each module that has some, or of all modules below one that reads these."""
    owned: dict[nn.Module, list[Own]] = {}
    inner: set[nn.Module] = set()
    for module in root.modules():
        if module in inner:
            continue
        reads_below = isinstance(module, SEES_CLASSES) and not isinstance(module, nn.TransformerEncoder)
        holders = list(module.modules()) if reads_below else [module]
        inner.update(holders if reads_below else ())
        own = [
            Own(holder, name, parameter)
            for holder in holders
            for name, parameter in holder._parameters.items()
            if id(parameter) in moving and parameter is not None
        ]
        if own:
            owned[module] = own
    return owned


def _factorable(owned: dict[nn.Module, list[Own]]) -> frozenset[int]:
    """The ids of the weights that every module that owns them only multiplies with."""
    found: dict[int, bool] = {}
    for module, own in owned.items():
        multiplied = layers.factorable(module)
        for each in own:
            key = id(each.parameter)
            found[key] = found.get(key, True) and each.parameter is multiplied
    return frozenset(key for key, is_multiplied in found.items() if is_multiplied)
