"""The optimizer: a step is an estimate and an update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zoext import noise, probes
from zoext._engine.applied_step import GroupOptions, Recorder, TakenStep
from zoext._engine.axes import Axes
from zoext._engine.losses import Closure, Losses
from zoext._engine.nonfinite import NonfiniteWatch
from zoext._engine.step_seeds import StepSeeds
from zoext._parameters import group_options, parameters
from zoext._parameters.parameters import Parameters
from zoext._parameters.precision import checked_state, own_state, rounded, rounding_of, with_residuals
from zoext._runtime import interrupts
from zoext._runtime.profiling import Phase, record
from zoext._runtime.randomness import RandomState
from zoext.directions import Combination, Direction, Frame, Gaussian, Observer, Step, Terms
from zoext.estimators import CentralDifference, Estimate, Estimator, average
from zoext.graphs import GraphedStep
from zoext.ops import Rounding
from zoext.updates import SGD, Move, State, Update


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Fine-tunes with forward passes only: any direction with any estimator and any update.

    A step evaluates the closure at displaced weights, turns the losses into a gradient estimate
    ``sum_k c_k D(s_k)`` and moves theta along it. A torch.optim.Optimizer in every habit: parameter
    groups with ``lr``, ``mu`` and ``weight_decay``, schedulers, hooks, and a ``state_dict`` of plain
    data from which training continues bit for bit. Profilers see its phases, ``zoext.estimate`` (with
    ``zoext.perturb``, ``zoext.forward`` and ``zoext.restore`` in it) and ``zoext.update``, as events.

    Args:
        params: an ``nn.Module``, or what torch.optim takes (tensors, dicts, ``named_parameters()``).
            Only parameters that require grad move; all of them count for the keys of the noise.
        direction: what ``D(s)`` looks like. Default: ``Gaussian()``.
        estimator: which probes, and which coefficients they give. Default: ``CentralDifference()``.
        update: how theta moves. Default: ``SGD()``.
        lr: learning rate. Default 1e-6.
        mu: scale of the displacement at which losses are evaluated. Default 1e-3. In a group with
            another ``mu`` the direction is longer or shorter there and the estimate is divided by the
            same factor, so that it stays an estimate of the same gradient.
        weight_decay: decoupled; theta loses ``lr * weight_decay * theta`` a step. Default 0.
        seed: 64-bit seed of the run. With the step number it determines every direction.
        probe: "streamed" restores theta bit for bit and needs an ``nn.Module``; "inplace" restores it to
            rounding; "auto" (default) is "streamed" where ``params`` is a module that is not compiled,
            else "inplace". Or a ``Probe``.
        nonfinite: what to do about a loss that is not finite. It never moves theta. "raise" (default)
            raises a FloatingPointError, on CUDA at the latest at the start of the next step, so that no
            step waits for the host; "skip" counts the step in ``nonfinite_steps`` and goes on.
        precision: what becomes of the part of an update that weights of 16 bits cannot hold. "nearest"
            loses it: theta stays where it is under steps of less than half a unit in its last place.
            "stochastic" (default) rounds up with the probability that makes the expectation exact; the bits
            come from the noise field. "residual" keeps it in an int8 beside each weight
            (``state[parameter]["residual"]``): with it theta moves like a float of 24 bits, and the closure
            sees the nearest one of 16. Weights of 32 and 64 bits are not concerned.

    Attributes:
        last_estimate: the estimate that the last step applied.
        recorder: is told of every step, such as a ``Trajectory``; None if nobody is.

    Raises:
        ValueError, TypeError: for arguments out of range and for parameters that cannot be moved.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        direction: Direction | None = None,
        estimator: Estimator | None = None,
        update: Update | None = None,
        lr: float | Tensor = 1e-6,
        mu: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        probe: str | probes.Probe = "auto",
        nonfinite: str = "raise",
        precision: str = "stochastic",
    ) -> None:
        self._axes = Axes(direction or Gaussian(), estimator or CentralDifference(), update or SGD())
        for axis, kind in zip(self._axes._fields, (Direction, Estimator, Update), strict=True):
            member = getattr(self._axes, axis)
            if not isinstance(member, kind):
                raise TypeError(f"{axis} must be a {kind.__name__}, not {member!r}")
        self._watch = NonfiniteWatch(nonfinite)
        self._rounding = rounding_of(precision)
        noise.signed(seed)
        self._module = params if isinstance(params, nn.Module) else getattr(probe, "module", None)
        defaults = {
            "lr": lr,
            "mu": mu,
            "weight_decay": weight_decay,
            "seed": seed,
            "step": 0,
            "recipe": self._axes.recipe(),
            "precision": precision,
            "update_state": {},
        }
        self._defaults = dict(defaults)  # torch adds its own to ``defaults`` when a state is loaded
        self._pending: list[Estimate] = []
        self._seeds: tuple[int, StepSeeds] | None = None
        self._groups: list[Parameters] = []
        self._mus: list[float] = []
        self._frame: Frame | None = None
        self._frame_finite: Tensor | None = None
        self._estimating = False
        self._is_torn = False
        self.last_estimate: Estimate | None = None
        self.recorder: Recorder | None = None
        given: Any = list(params.named_parameters()) if isinstance(params, nn.Module) else params
        super().__init__(given, defaults)
        whole = params if isinstance(params, nn.Module) else None
        self._probe = probes.choose(probe, whole)
        self._axes.direction.check(self._module, parameters.trainable(self.param_groups))

    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its parameters take the next keys, those of the others do not change.

        Raises:
            RuntimeError: while the steps are recorded.
        """
        self._check_not_recorded("add_param_group")
        group = dict(param_group)
        for name in ("seed", "recipe", "precision"):
            if group.get(name, self._defaults[name]) != self._defaults[name]:
                raise ValueError(
                    f"{name} belongs to the whole optimizer and is {self._defaults[name]!r}; leave it out of "
                    f"the group, which has {group[name]!r}"
                )
        given = group["params"]
        if isinstance(given, set):
            raise TypeError("params must be in an order that does not change; pass a list, not a set")
        group["params"] = given = [given] if isinstance(given, Tensor) else list(given)
        named = [
            entry if isinstance(entry, tuple) else (f"parameter {i}", entry) for i, entry in enumerate(given)
        ]
        for name, tensor in named:
            parameters.check(tensor, name)
            if sum(tensor is other for _, other in named) > 1:
                raise ValueError(f"params: {name} is given twice; give tied weights once")
        group_options.check({**self.defaults, **group})
        if self.param_groups:
            group["step"] = self.param_groups[0]["step"]
        added = {"params": [tensor for _, tensor in named]}
        parameters.check_one_device(parameters.trainable([*self.param_groups, added]))
        super().add_param_group(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict`` bit for bit; it must come from the same recipe.

        Raises:
            ValueError: for a state of another recipe or precision.
            RuntimeError: while the steps are recorded.
        """
        self._check_not_recorded("load_state_dict")
        # After the hooks of the user, who may change what is loaded, and before those that see what was.
        before = self.register_load_state_dict_pre_hook(lambda _, state: self._checked(state))
        after = self.register_load_state_dict_post_hook(lambda _: self._settle(), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def state_dict(self) -> dict[str, Any]:
        """As in torch.

        Raises:
            RuntimeError: after an update that raised half-way: loading it would hide that.
        """
        self._check_whole()
        return super().state_dict()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        recipe, precision = self._axes.recipe(), self._defaults["precision"]
        for group in state_dict["param_groups"]:
            if missing := self._defaults.keys() - group.keys():
                raise ValueError(
                    f"state_dict has no {', '.join(sorted(missing))}: it is not that of a zoext optimizer"
                )
            if group["recipe"] != recipe:
                raise ValueError(
                    f"state_dict comes from the recipe {group['recipe']}, this optimizer has {recipe}; "
                    "build it with the same direction, estimator and update"
                )
            if group["precision"] != precision:
                raise ValueError(
                    f"state_dict comes from precision={group['precision']!r}, this optimizer has "
                    f"{precision!r}; build it with the same"
                )
        state = dict(state_dict["state"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for tensor, name in zip(group["params"], saved["params"], strict=False):  # torch compares lengths
                if own := state.pop(name, None):
                    state[name] = checked_state(tensor, own)
        return {**state_dict, "state": state}

    def _settle(self) -> None:
        """Makes loaded data this optimizer's own."""
        for tensor, own in self.state.items():
            self.state[tensor] = own_state(tensor, own)
        for group in self.param_groups:
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            group["update_state"] = tree_map(partial(_to, device), group["update_state"])
        self._pending.clear()
        self._is_torn = False

    def _check_not_recorded(self, what: str) -> None:
        if self.recorder is not None:
            raise RuntimeError(
                f"{what}: the steps of this optimizer are recorded, and a replay would know nothing of it; "
                "close() the trajectory first, and begin another one or resume it afterwards"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy, together with the model; checkpoints are made of ``state_dict``."""
        kept = (
            "_axes",
            "_watch",
            "_module",
            "_probe",
            "_defaults",
            "_rounding",
            "_mus",
            "_estimating",
            "_is_torn",
        )
        fresh: dict[str, Any] = {
            "_pending": [],
            "_seeds": None,
            "_groups": [],
            "_frame": None,
            "_frame_finite": None,
            "recorder": None,
        }
        own = {name: self.__dict__[name] for name in (*kept, "_is_torn", "last_estimate")}
        return {**super().__getstate__(), **fresh, **own}

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Moves theta by the estimate with ``closure``, or without one by the mean of the pending estimates.

        Args:
            closure: takes nothing, evaluates the model on the step's batch and returns the loss, a
                tensor of one element or a float. Runs several times, without gradients. Or a
                ``GraphedStep`` of this optimizer.

        Returns:
            The mean of the losses evaluated, float32 [], on the device of the parameters.

        Raises:
            RuntimeError: without a closure and without a preceding ``estimate``, and while a CUDA graph is
                captured: use ``GraphedStep``.
        """
        _check_not_captured()
        if isinstance(closure, GraphedStep):
            return closure._advance(self)
        return self._step(closure)

    def _step(self, closure: Closure | None) -> Tensor:
        if closure is not None:
            self._pending.clear()
            self.estimate(closure)
        if not self._pending:
            raise RuntimeError("step() has nothing to apply: call estimate(closure) first, or step(closure)")
        self._check_unchanged("the estimate was made, so it does not fit any more")
        for options in self.param_groups:
            group_options.check_on_host(options)
        with torch.inference_mode(False), torch.no_grad(), interrupts.deferred(), record(Phase.UPDATE):
            estimate = average(self._pending)
            self._pending.clear()  # first: should an update raise, no group is to move twice
            assert self._frame is not None
            step = TakenStep(estimate, self._frame, self._options())
            self._take([step])
            self._finish_step(step)
        return estimate.loss

    def _options(self) -> tuple[GroupOptions, ...]:
        groups = zip(self.param_groups, self._mus, strict=True)
        return tuple(GroupOptions(group["lr"], mu, float(group["weight_decay"])) for group, mu in groups)

    def _finish_step(self, step: TakenStep) -> None:
        self._frame = None
        if self.recorder is not None:
            self.recorder.record(step)

    def _count(self, steps: Sequence[TakenStep]) -> None:
        for group in self.param_groups:
            group["step"] += len(steps)
        self.last_estimate = steps[-1].estimate

    # Estimates

    def estimate(self, closure: Closure) -> Estimate:
        """Probes only: theta is unchanged. ``step()`` applies the mean of all estimates since the last step.

        Several calls before a ``step()`` see the same directions, so with finite differences equal
        micro-batches give the estimate of the whole batch: do not divide their losses. Pools choose for
        each micro-batch on its own, and the step takes the mean of what was chosen. One that raises
        discards them all; ``step(closure)`` does too.

        Raises:
            TypeError, ValueError: for a closure that does not return one number.
            FloatingPointError: for a loss that is not finite, with ``nonfinite="raise"``.
            RuntimeError: for a closure that changes the parameters of the optimizer, and while a CUDA graph
                is captured: use ``GraphedStep``.
        """
        _check_not_captured()
        try:
            with self._estimation():
                estimate = self._estimate(closure)
        except BaseException:
            self._pending.clear()
            raise
        self._pending.append(estimate)
        return estimate

    @contextmanager
    def _estimation(self) -> Iterator[None]:
        """The block in which closures run."""
        if self._estimating:
            raise RuntimeError("estimate() was called by its own closure; call it between steps")
        self._estimating = True
        try:
            # Outside of inference mode: what is kept here must be usable by later steps.
            with torch.inference_mode(False), torch.no_grad(), record(Phase.ESTIMATE):
                yield
        finally:
            self._estimating = False

    def _estimate(self, closure: Closure) -> Estimate:
        self._check_whole()
        self._watch.check()
        if self.recorder is not None:
            self.recorder.check()
        if self._pending:
            self._check_unchanged("the first estimate of this step")
        groups = self._current_groups()
        movable = [group for group in groups if len(group)]
        if not movable:
            raise RuntimeError(
                "no parameter requires grad, so none can move; unfreeze some with requires_grad_()"
            )
        parameters.check_not_sharded(movable)
        parameters.check_one_device(movable)
        for group in movable:
            for tensor, name in zip(group.owners, group.names, strict=True):
                parameters.check(tensor, name)
        for options in self.param_groups:
            group_options.check_on_host(options)
        self._mus = [float(options["mu"]) for options in self.param_groups]
        device = movable[0].device
        estimate = self._evaluate(closure, self._step_seeds(device), RandomState(device))
        self._watch.note(estimate.finite)
        return estimate

    def _evaluate(self, closure: Closure, seeds: StepSeeds, random: RandomState | None) -> Estimate:
        """The part of an estimate that happens on the device, all that depends on the step in ``seeds``.

        ``random`` is the state of the generators that every probe is to begin with; None if none reads them.
        """
        observer = self._begin_frame(seeds.frame)
        with self._probe.session() as evaluate:
            losses = Losses(self, evaluate, closure, observer, random)
            estimate = self._axes.estimator.estimate(losses, seeds.draws, self._mus[0])
        return losses.complete(estimate)

    def _begin_frame(self, seed: Tensor) -> Observer | None:
        """Makes the frame of a new step, or returns what will make it out of a forward at theta."""
        if self._pending and self._frame is not None:
            return None
        self._frame_finite = None
        step = Step(seed, self._groups)
        observer = self._axes.direction.observer(self._module, step)
        self._frame = self._axes.direction.frame(step) if observer is None else None
        return observer

    def _combination(self, seeds: Tensor, coefficients: Tensor) -> Combination:
        """The combination at scale mu, in the frame of the step; at theta there need be none yet."""
        terms = tuple(
            (group, Terms(seeds, coefficients * mu, self._frame or Frame()))
            for group, mu in zip(self._groups, self._mus, strict=True)
            if len(group)
        )
        return Combination(self._axes.direction, seeds, terms)

    def _check_unchanged(self, since: str) -> None:
        known = self._groups
        if self._current_groups() is not known or self._mus != [group["mu"] for group in self.param_groups]:
            self._pending.clear()
            raise RuntimeError(
                "the optimizer's parameters (their list, their memory or requires_grad) or a group's mu "
                f"changed since {since}"
            )

    def _current_groups(self) -> list[Parameters]:
        """What moves now; the same object as before, if nothing has changed since."""
        now, known = self._trainable(), self._groups
        if len(now) != len(known) or not all(a.same_as(b) for a, b in zip(now, known, strict=True)):
            self._groups = now
        return self._groups

    def _trainable(self) -> list[Parameters]:
        groups = parameters.trainable(self.param_groups)
        if self._rounding is Rounding.RESIDUAL:
            groups = [with_residuals(group, self.state) for group in groups]
        return groups

    def _step_seeds(self, device: torch.device) -> StepSeeds:
        """The seeds of the current step: the same tensors for all estimates of the step."""
        step = self.param_groups[0]["step"]
        if self._seeds is None or self._seeds[0] != step or not self._pending:
            self._seeds = (step, self._empty_seeds(device))
            self._fill_seeds(self._seeds[1])
        return self._seeds[1]

    def _empty_seeds(self, device: torch.device) -> StepSeeds:
        return StepSeeds.empty(self._axes.estimator.draws, device)

    def _fill_seeds(self, seeds: StepSeeds) -> None:
        first = self.param_groups[0]
        seeds.fill(first["seed"], first["step"], self._axes.direction.origin(first["step"]))

    # Updates

    def _take(self, steps: Sequence[TakenStep]) -> None:
        """Moves theta by one step after the other that were taken before, as by a run that is replayed.

        Several steps at once leave the same bits as one call for each, in one pass over theta.
        """
        self._check_whole()
        before = self._versions()
        try:
            states = [
                self._update(position, group["update_state"], steps)
                for position, group in enumerate(self.param_groups)
            ]
        except BaseException:
            self._is_torn = self._versions() != before
            raise
        for group, state in zip(self.param_groups, states, strict=True):
            group["update_state"] = state
        self._count(steps)

    def _versions(self) -> list[int]:
        return [tensor._version for group in self._groups for tensor in group.tensors]

    def _check_whole(self) -> None:
        if self._is_torn:
            raise RuntimeError(
                "an update raised when it had moved some of the parameters, so theta is between two steps; "
                "load the weights and the state_dict of a checkpoint, or replay the trajectory on the base"
            )

    def _update(self, position: int, state: State, steps: Sequence[TakenStep]) -> State:
        """Moves the group at ``position`` and returns its new state."""
        movable = self._groups[position]
        if self._rounding is Rounding.STOCHASTIC:
            movable = rounded(movable, self._rounding)
        moves = [self._move(step, position) for step in steps]
        new = self._axes.update.apply(self._axes.direction, movable, moves, state)
        movable.tell_autograd()
        return new

    def _move(self, step: TakenStep, position: int) -> Move:
        lr, mu, weight_decay = step.options[position]
        # Coefficients are per mu of the first group; a direction of another length scales them.
        relative = step.options[0].mu / mu
        coefficients = step.estimate.coefficients
        terms = Terms(
            step.estimate.seeds, coefficients if relative == 1 else coefficients * relative, step.frame
        )
        # A tensor counts as the float that it holds: products with it are rounded alike.
        lr = lr.double() if isinstance(lr, Tensor) else lr
        return Move(self._axes.direction.gradient(terms), step.estimate, lr, weight_decay)

    @property
    def nonfinite_steps(self) -> int:
        """How many estimates had a loss that was not finite, since this object was made. Waits for them."""
        return self._watch.count


def _check_not_captured() -> None:
    # Asked only where CUDA is in use: it must not begin to be.
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step cannot be captured in a CUDA graph from outside: its seeds come from the host, so every "
            "replay would go along the same directions. Use zoext.GraphedStep(optimizer, closure), which "
            "captures the step and gives each replay its own seeds"
        )


def _to(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
