"""The step engine: everything in a step that torch.optim.Optimizer does not define.

The optimizer, ``GraphedStep`` and the replay of trajectories use it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoext._engine import applying
from zoext._engine.applying import AppliedStep, GroupOptions
from zoext._engine.axes import Axes
from zoext._engine.context import StepContext, StepSeeds
from zoext._engine.copies import check_closure
from zoext._engine.deferral import Deferral
from zoext._engine.estimation import Closure, Estimation, MissingLossError
from zoext._engine.first_order import nothing_to_apply
from zoext._engine.loss_watch import LossWatch
from zoext._engine.open_round import Asking, OpenRound, Told, checked_pairs, displaced
from zoext._engine.run_state import Owner, RunState
from zoext._parameters import group_options, parameters
from zoext._parameters.parameters import Parameters
from zoext._parameters.precision import with_residuals
from zoext._runtime import interrupts
from zoext._runtime.devices import check_not_captured, moved
from zoext._runtime.profiling import Phase, record
from zoext.distributed import Sharing
from zoext.estimators import Estimate, Round, reduced
from zoext.ops import Rounding
from zoext.probes import BatchedProbe, Probe
from zoext.updates import State


class StepEngine:
    """Computes the estimates and updates of one optimizer.

    Args:
        owner: the optimizer, which holds the parameter groups and the state; referenced weakly.
        axes: direction, estimator and update.
        module: the module whose forward some directions observe; None if unknown.
        probe: evaluates closures at displaced weights.
        rounding: how updates are rounded.
        watch: acts on losses that are not finite.
        ranks: the ranks that take the step together.
        reduction: "mean" or "sum" of the pending estimates of a step.
    """

    def __init__(
        self,
        owner: Owner,
        axes: Axes,
        module: nn.Module | None,
        probe: Probe,
        rounding: Rounding,
        watch: LossWatch,
        ranks: Sharing,
        reduction: str,
    ) -> None:
        self.axes = axes
        self.module = module
        self.probe = probe
        self.rounding = rounding
        self.watch = watch
        self.ranks = ranks
        self._reduction = reduction
        self.run = RunState()
        self.deferral = Deferral(axes.direction, module, self.run)
        self.groups: tuple[Parameters, ...] = ()  # the trainable tensors of each group, as of ``look``
        self._movable: tuple[Parameters, ...] | None = None  # the groups that were checked
        self._mus: tuple[float, ...] = ()
        self._seeds: tuple[int, StepSeeds] | None = None
        self.bind(owner)

    def bind(self, owner: Owner) -> None:
        """Makes ``owner`` the optimizer of this engine."""
        self._owner = weakref.ref(owner)

    def reset(self) -> None:
        """Discards what refers to the weights from before a state was loaded."""
        self.run.cancel()
        self.run.is_torn = False
        self.deferral.forget_looks()

    def __getstate__(self) -> dict[str, Any]:
        """Supports copy.deepcopy of an optimizer together with its model; ``bind`` completes the copy."""
        run = RunState(last_estimate=self.run.last_estimate, is_torn=self.run.is_torn)
        names = ("axes", "module", "probe", "rounding", "watch", "ranks", "_reduction")
        kept = {name: getattr(self, name) for name in names}
        deferral = self.deferral.fresh(run)
        empty = {"groups": (), "_movable": None, "_mus": (), "_seeds": None}
        return {**kept, **empty, "run": run, "deferral": deferral}

    @property
    def owner(self) -> Owner:
        """The optimizer itself, without its wrappers."""
        owner = self._owner()
        assert owner is not None, "the optimizer of this step engine is gone"
        return owner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.owner.param_groups

    # Estimates

    def estimate(self, closure: Closure) -> Estimate:
        """See ``ZerothOrderOptimizer.estimate``."""
        self.run.check_no_round()
        check_closure(closure, takes_copies=isinstance(self.probe, BatchedProbe))
        try:
            with self.closures(), record(Phase.ESTIMATE):
                context = self._begin()
                with self.probe.session() as session:
                    estimation = self._estimation(context)
                    estimate = estimation.run(session, closure)
                    session.take_buffers()(estimate.finite)
                self.run.frame = estimation.found
                self.watch.note(estimate)
        except BaseException:
            self.run.pending.clear()
            raise
        self.run.pending.append(estimate)
        estimation.check_own()
        return estimate

    def ask(self) -> OpenRound:
        """See ``ZerothOrderOptimizer.ask``."""
        self.ranks.check_asking()
        try:
            with self.closures():
                asking = Asking(self._estimation(self._begin()), self.probe, self.closures, self.owner)
        except FloatingPointError:  # raised for an earlier estimate of this step
            self.run.pending.clear()
            raise
        self.run.asking = asking
        assert asking.round is not None
        return asking.round

    def tell(self, losses: Told) -> OpenRound | None:
        """See ``ZerothOrderOptimizer.tell``."""
        asking = self.run.asking
        if asking is None or asking.round is None:
            raise RuntimeError("tell() was called without an open round; call ask() first")
        self.run.check_between_closures()
        self._check_unchanged("ask(); the round is cancelled, so call ask() again")
        with torch.inference_mode(False), torch.no_grad():
            estimate = asking.tell(losses)
            if estimate is None:
                return asking.round
            self.run.asking = None
            self.run.frame = asking.estimation.found
            try:
                self.watch.note(estimate)
            except BaseException:
                self.run.pending.clear()
                raise
        self.run.pending.append(estimate)
        return None

    @contextmanager
    def displaced(
        self, seeds: Tensor | Sequence[int], coefficients: Tensor | Sequence[float]
    ) -> Iterator[None]:
        """See ``ZerothOrderOptimizer.displaced``."""
        pairs = checked_pairs(seeds, coefficients)
        with self.closures(), record(Phase.ESTIMATE):
            context = self._begin(is_shared=False)
            estimation = self._estimation(context)
            estimation.check_frame("displaced")
            seeds, coefficients = (moved(each, context.device) for each in pairs)
            estimation.begin(Round.along_sums(seeds, coefficients.unsqueeze(0)), range(1))
            with self.probe.session() as session, displaced(estimation, session, 0):
                yield

    @contextmanager
    def closures(self) -> Iterator[None]:
        """The block in which closures run, with gradients disabled; raises if it is nested."""
        self.run.check_between_closures()
        self.run.is_estimating = True
        try:
            # Inference mode is off because later steps use tensors that are created here.
            with torch.inference_mode(False), torch.no_grad(), self.deferral.probing():
                yield
        finally:
            self.run.is_estimating = False

    def _begin(self, *, is_shared: bool = True) -> StepContext:
        """The context of a step, after all checks that need no probe; estimates are shared with processes."""
        check_not_captured()
        self.check_ready(recorder=not self.ranks.are_several)  # else in a round, see Estimation
        if self.run.pending:
            self._check_unchanged("the first estimate of this step was made")
        movable = [group for group in self.look() if len(group)]
        if self.groups is not self._movable or not all(group.is_whole for group in movable):
            parameters.check_movable(movable)
            self._movable = self.groups
        group_options.check_on_host(*self.param_groups)
        self._mus = tuple(float(options["mu"]) for options in self.param_groups)
        self.deferral.begin(self.param_groups)
        if is_shared:
            device, is_first, looks = movable[0].device, not self.run.pending, self.deferral.looks
            self.ranks.begin(self.groups, self.param_groups, device, is_first=is_first, looks=looks)
        return self.context(self._step_seeds(movable[0].device))

    def check_ready(self, *, recorder: bool = True) -> None:
        """Raises if no step may begin: after a torn update, in an open round, or if recording would fail."""
        self.run.check_whole()
        self.run.check_no_round()
        if recorder:
            self.run.check_recorder()
        self.watch.check()  # last, because it may wait for the previous step

    def context(self, seeds: StepSeeds, *, shares_random: bool = True) -> StepContext:
        """The context of a step with the parameters and scales that the engine last read."""
        devices = parameters.devices(self.param_groups)
        own = (self.axes, self.module, self.groups, self._mus)
        self.deferral.drawn = {}
        held = self.deferral.sums, self.deferral.drawn
        return StepContext(*own, seeds, devices, shares_random, *held)

    def _estimation(self, context: StepContext) -> Estimation:
        found = self.run.frame if self.run.pending else None
        check = partial(self._check_unchanged, "the closure began")
        return Estimation(context, found, self.ranks, check, self.run.check_recorder, self.run.has_kept)

    # Steps

    def step(self, closure: Closure) -> AppliedStep:
        """Makes an estimate with ``closure``, discards pending estimates, and applies the update.

        A closure that returns None, as Lightning passes for ``step()``, applies the pending ones instead.
        """
        self.run.check_no_round()
        check_closure(closure, takes_copies=isinstance(self.probe, BatchedProbe))
        with self.run.keeping_pending() as pending:
            try:
                return self._step(closure)
            except MissingLossError:
                if not pending:
                    raise
        self.run.pending = pending
        return self.step_pending()

    def _step(self, closure: Closure) -> AppliedStep:
        def finish(estimate: Estimate) -> tuple[GroupOptions, ...]:
            self.watch.note(estimate)
            group_options.check_on_host(*self.param_groups)
            return self.options()

        with self.closures():
            states = [group["update_state"] for group in self.param_groups]
            return self.compute(self._begin(), closure, states, finish, self.commit)

    def step_pending(self) -> AppliedStep:
        """Applies the mean or the sum of the pending estimates."""
        check_not_captured()
        self.run.check_between_closures()
        self.run.check_no_round()
        pending = self.run.pending
        if not pending:
            raise nothing_to_apply(self.param_groups)
        self._check_unchanged("the estimate was made, so it does not fit any more")
        group_options.check_on_host(*self.param_groups)
        options = self.options()
        with torch.inference_mode(False), torch.no_grad():
            estimate = reduced(pending, self._reduction)
            pending.clear()  # before the update: if that raises, a retry must not move a group twice
            assert self.run.frame is not None
            step = AppliedStep(estimate, self.run.frame.frame, options)
            states = [group["update_state"] for group in self.param_groups]
            with applying.updating(self.module):
                with self.run.tearing(self.groups):
                    moved = applying.apply(self._target, states, [step])
                self.commit(step, moved)
        return step

    def compute(
        self,
        context: StepContext,
        closure: Closure,
        states: Sequence[State],
        finish: Callable[[Estimate], tuple[GroupOptions, ...]],
        commit: Callable[[AppliedStep, list[State]], None],
    ) -> AppliedStep:
        """The part of a step that runs on the device, and that a CUDA graph captures.

        ``states`` holds the update's state for each parameter group. ``finish(estimate)`` is called before
        the update and returns the options of the step. ``commit(step, states)`` is called after the update
        and before signals take effect. A linear update of float32 weights also restores theta.
        """
        target = self._target
        with ExitStack() as phase:
            phase.enter_context(record(Phase.ESTIMATE))
            with self.probe.session() as session:
                estimation = self._estimation(context)
                estimate = estimation.run(session, closure)
                step = AppliedStep(estimate, estimation.found.frame, finish(estimate))
                if session.is_displaced and applying.can_restore(target):
                    phase.close()
                    with applying.updating(self.module):
                        with self.run.tearing(self.groups):
                            moved = applying.restore_and_apply(target, states, step, session, estimation)
                        session.take_buffers()(estimate.finite)
                        commit(step, moved)
                    estimation.check_own()
                    return step
        with applying.updating(self.module):
            with self.run.tearing(self.groups):
                moved = applying.apply(target, states, [step])
            session.take_buffers()(estimate.finite)
            commit(step, moved)
        estimation.check_own()
        return step

    def apply(self, steps: Sequence[AppliedStep]) -> None:
        """Applies recorded steps to theta in order, as a replay does.

        One call with several steps passes over theta once and gives the same bits as one call per step.
        """
        self.run.check_whole()
        with interrupts.deferred():
            for some in self.deferral.between_merges(steps, self.param_groups):
                states = [group["update_state"] for group in self.param_groups]
                with self.run.tearing(self.groups):
                    states = applying.apply(self._target, states, some)
                self._count(some, states)

    def commit(self, step: AppliedStep, states: Sequence[State]) -> None:
        """Counts and records ``step``, which has moved theta."""
        merged = self._count([step], states)
        if self.run.recorder is not None:
            self.run.recorder.record(replace(step, merged=merged))

    def _count(self, steps: Sequence[AppliedStep], states: Sequence[State]) -> bool:
        for group, state in zip(self.param_groups, states, strict=True):
            group["update_state"] = state
            group["step"] += len(steps)
        self.run.last_estimate = steps[-1].estimate
        self.run.frame = None
        return self.deferral.count(steps[-1].estimate.seeds)

    @property
    def _target(self) -> applying.Target:
        return applying.Target(self.axes, self.groups, self.rounding, self.deferral)

    # Parameters, options and seeds

    def look(self) -> tuple[Parameters, ...]:
        """The trainable tensors of each parameter group; returns the previous object if nothing changed."""
        owner = self.owner
        if parameters.are_trainable(self.groups, owner.param_groups):
            return self.groups
        now = parameters.trainable(owner.param_groups)
        if self.rounding is Rounding.RESIDUAL:
            now = [with_residuals(group, owner.state) for group in now]
        known = self.groups
        if len(now) != len(known) or not all(a.same_as(b) for a, b in zip(now, known, strict=True)):
            self.deferral.merge()  # into the weights that it belongs to
            self.groups = tuple(now)
        return self.groups

    def options(self) -> tuple[GroupOptions, ...]:
        """The current options of each parameter group."""
        groups = zip(self.param_groups, self._mus, strict=True)
        return tuple(GroupOptions(group["lr"], mu, float(group["weight_decay"])) for group, mu in groups)

    def _check_unchanged(self, since: str) -> None:
        known = self.groups
        if self.look() is not known or self._mus != tuple(group["mu"] for group in self.param_groups):
            self.run.cancel()
            changed = parameters.changed_names(known, self.groups)
            names = f": {', '.join(changed[:3])}" if changed else ""
            raise RuntimeError(
                "the optimizer's parameters (their list, their memory or requires_grad) or a group's mu "
                f"changed since {since}{names}. If a module casts or moves its weights in its first forward, "
                "run the model once before the first step"
            )

    def _step_seeds(self, device: torch.device) -> StepSeeds:
        """The seeds of the current step. All estimates of the step share the same tensors."""
        step = self.param_groups[0]["step"]
        if self._seeds is None or self._seeds[0] != step or not self.run.pending:
            self._seeds = (step, StepSeeds.empty(self.axes.estimator.draws, device))
            self.fill_seeds(self._seeds[1])
        return self._seeds[1]

    def fill_seeds(self, seeds: StepSeeds) -> None:
        """Writes the seeds of the current step."""
        first = self.param_groups[0]
        seeds.fill(first["seed"], first["step"], self.axes.direction.origin(first["step"]))
