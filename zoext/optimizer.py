"""The optimizer: the interface of torch.optim.Optimizer on top of the step engine."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zoext import noise, probes
from zoext._asking import LossesFromElsewhere
from zoext._engine import (
    Axes,
    Closure,
    LossWatch,
    Recorder,
    StepEngine,
    StepExecutor,
    check_deferring,
    check_groups,
    check_not_scaled,
    check_not_skipping,
    check_not_trainer,
    initializes_state,
    saved_state,
)
from zoext._parameters import group_options, parameters
from zoext._parameters.outline import outline
from zoext._parameters.precision import own_state, rounding_of
from zoext.directions import Direction, Gaussian
from zoext.distributed import ElasticGroup, sharing_of
from zoext.estimators import CentralDifference, Estimate, Estimator, checked_reduction
from zoext.updates import SGD, Update

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class ZerothOrderOptimizer(LossesFromElsewhere, torch.optim.Optimizer):
    """Fine-tunes with forward passes only, combining a direction, an estimator and an update.

    A step evaluates the closure at displaced weights, turns the losses into a gradient estimate
    ``sum_k c_k D(s_k)`` and moves theta along it. It is a drop-in torch.optim.Optimizer: parameter
    groups with ``lr``, ``mu`` and ``weight_decay``, schedulers, hooks, and a ``state_dict`` of plain
    data from which training continues bit for bit. Profilers see its phases, ``zoext.estimate`` (with
    ``zoext.perturb``, ``zoext.forward`` and ``zoext.restore`` in it) and ``zoext.update``, as events.

        optimizer = zoext.ZerothOrderOptimizer(model, estimator=zoext.ForwardDifference(samples=4), lr=1e-5)
        loss = optimizer.step(lambda: model(x).square().mean())

    A step can be taken in three ways, which give the same bits with streamed probes: ``step(closure)``;
    ``estimate(closure)``, once or for each micro-batch, followed by ``step()``; or ``ask`` and ``tell``, with
    losses that are computed elsewhere, followed by ``step()``.

    Args:
        params: an ``nn.Module``, or what torch.optim accepts (tensors, dicts, ``named_parameters()``).
            Only parameters that require grad move, but frozen ones also count in the numbering of the
            noise keys.
        direction: the distribution of ``D(s)``. Default: ``Gaussian()``.
        estimator: which probes are evaluated, and how losses become coefficients. Default:
            ``CentralDifference()``.
        update: how theta moves. Default: ``SGD()``.
        lr: learning rate. Default 1e-6.
        mu: scale of the displacement at which losses are evaluated. Default 1e-3. A group with
            another ``mu`` scales the direction by the ratio and divides the estimate by it, so that it
            remains an estimate of the same gradient.
        weight_decay: decoupled weight decay; each step subtracts ``lr * weight_decay * theta``. Default 0.
        seed: 64-bit seed of the run. Together with the step number it determines every direction.
        probe: "streamed" restores theta bit for bit and needs an ``nn.Module``; "inplace" restores it up
            to rounding; "auto" (default) is "streamed" if ``params`` is a module that is not compiled, and
            "inplace" otherwise. A ``Probe`` is also accepted.
        reduction: how ``step()`` combines the estimates of several ``estimate`` calls. "mean" (default) is
            for losses that are means over a micro-batch, "sum" for losses that are parts of the batch's loss,
            such as those divided by the number of tokens of all micro-batches.
        process_group: the data-parallel ranks, which train the same weights on different batches. The loss of
            every probe is averaged over them in one collective a round, so that all ranks take the same step;
            weights are never sent. "auto" (default) means the default process group of torch.distributed, if
            it is initialized; None means that this process trains alone. A ``DeviceMesh`` whose dimensions
            are named "data" and "probe" stands for both groups. At the first step and every 100 steps a
            digest of the weights is compared. An ``ElasticGroup`` stands for processes that may come and go.
        probe_group: the probe-parallel ranks, which have the same batch; the probes of each round are dealt
            out over them. None (default) means that each rank evaluates all probes.
        nonfinite: how to handle a loss that is not finite. Such a loss never moves theta. "raise" (default)
            raises a FloatingPointError, on CUDA at the latest at the start of the next step, so that no
            step waits for the host; "skip" counts the estimate in ``nonfinite_steps`` and continues.
        precision: rounding of updates to 16-bit weights. "nearest" loses every update of less than half a
            unit in the last place. "stochastic" (default) rounds up with the probability that makes the
            expectation exact; the random bits come from the noise field. "residual" stores the rounding
            error in an int8 for each weight (``state[parameter]["residual"]``): theta is updated like a
            24-bit float, and the closure uses the nearest 16-bit value. Has no effect on 32- and 64-bit
            weights.

    Attributes:
        probe: evaluates the closure at displaced weights; ``probe.describe()`` tells which ones and how.
        last_estimate: the estimate that the last step applied; None before the first.
        recorder: receives every step, such as a ``Trajectory``; None if there is none.
        nonfinite_steps: the number of estimates with a loss that was not finite.
        engine: the step engine, which wrappers of the optimizer share. Internal.

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
        reduction: str = "mean",
        process_group: ProcessGroup | DeviceMesh | ElasticGroup | str | None = "auto",
        probe_group: ProcessGroup | None = None,
        nonfinite: str = "raise",
        precision: str = "stochastic",
    ) -> None:
        axes = Axes(direction or Gaussian(), estimator or CentralDifference(), update or SGD())
        axes.check()
        watch, rounding, ranks = (
            LossWatch(nonfinite),
            rounding_of(precision),
            sharing_of(process_group, probe_group),
        )
        checked_reduction(reduction)
        noise.signed(seed)
        whole = params if isinstance(params, nn.Module) else None
        module = whole if whole is not None else getattr(probe, "module", None)
        self._own_defaults = {  # torch adds its own to ``defaults`` when a state is loaded
            "lr": lr,
            "mu": mu,
            "weight_decay": weight_decay,
            "seed": seed,
            "step": 0,
            "recipe": axes.recipe(),
            "precision": precision,
            "update_state": {},
        }
        chosen = probes.choose(probe, whole)
        ranks.check(is_exact=chosen.is_exact, watches=axes.direction.watches)
        check_deferring(axes.direction, chosen, ranks)
        self.engine = StepEngine(self, axes, module, chosen, rounding, watch, ranks, reduction)
        given: Any = params if whole is None else list(whole.named_parameters())
        super().__init__(given, dict(self._own_defaults))
        axes.direction.check(module, parameters.trainable(self.param_groups))
        check_groups(axes.direction, self.param_groups)

    def __repr__(self) -> str:
        first, probe = self.param_groups[0], type(self.probe).__name__
        lines = [f"{axis}: {member!r}" for axis, member in self.engine.axes._asdict().items()]
        lines.append(f"probe: {probe}, seed: {first['seed']}, precision: {first['precision']}")
        lines += [f"group {i}: {outline(group)}" for i, group in enumerate(self.param_groups)]
        return "\n".join([f"{type(self).__name__}(", *(f"  {line}" for line in lines), ")"])

    # torch.optim.Optimizer

    #: Has torch.amp.GradScaler call ``step``, which then names the remedy.
    _step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. Its parameters get the next noise keys; the keys of other groups do not change.

        Raises:
            RuntimeError: while the steps are recorded.
        """
        self._check_not_recorded("add_param_group")
        self.engine.deferral.merge()
        group = dict(param_group)
        for name in ("seed", "recipe", "precision"):
            if group.get(name, self._own_defaults[name]) != self._own_defaults[name]:
                raise ValueError(
                    f"{name} belongs to the whole optimizer and is {self._own_defaults[name]!r}; leave it "
                    f"out of the group, which has {group[name]!r}"
                )
        given = group["params"]
        if isinstance(given, set):
            raise TypeError("params must be in an order that does not change; pass a list, not a set")
        group["params"] = given = [given] if isinstance(given, Tensor) else list(given)
        first_key = sum(len(other["params"]) for other in self.param_groups)
        named = [
            entry if isinstance(entry, tuple) else (f"parameter {first_key + i}", entry)
            for i, entry in enumerate(given)
        ]
        for name, tensor in named:
            parameters.check(tensor, name)
            if sum(tensor is other for _, other in named) > 1:
                raise ValueError(f"params: {name} is given twice; give tied weights once")
        group_options.check({**self.defaults, **group})
        if self.param_groups:
            group["step"] = self.param_groups[0]["step"]
            # torch wants names in all groups or in none.
            has_names = "param_names" in self.param_groups[0]
            group["params"] = named if has_names else [tensor for _, tensor in named]
        super().add_param_group(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict`` bit for bit; it must come from the same recipe.

        Raises:
            ValueError: for a state of another recipe or precision.
            RuntimeError: while the steps are recorded, unless the state is the one that the optimizer has,
                as when Accelerate prepares it.
        """
        if self.recorder is not None and saved_state.same(self.state_dict(), state_dict):
            return
        self._check_not_recorded("load_state_dict")
        self.engine.deferral.merge(loads=True)
        # The check runs after the user's pre-hooks, which may change the state; _settle runs before the
        # user's post-hooks, which see the result.
        before = self.register_load_state_dict_pre_hook(lambda _, state: self._checked(state))
        after = self.register_load_state_dict_post_hook(lambda _: self._settle(), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def state_dict(self) -> dict[str, Any]:
        """See ``torch.optim.Optimizer.state_dict``.

        Raises:
            RuntimeError: after an update that was only partly applied; loading such a state would hide that.
        """
        self.engine.run.check_whole()
        self.merge()
        return saved_state.packed(super().state_dict())

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        fixed = {**self._own_defaults, "recipe": self.engine.axes.recipe()}
        return saved_state.checked(state_dict, self.param_groups, fixed)

    def _settle(self) -> None:
        """Moves loaded data to the devices where this optimizer uses it, and resets the engine."""
        for tensor, own in self.state.items():
            self.state[tensor] = own_state(tensor, own)
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        # As in a step: seeds and losses are where the first parameter is that moves.
        device = next((tensor.device for tensor in tensors if tensor.requires_grad), torch.device("cpu"))
        for group in self.param_groups:
            group["update_state"] = tree_map(partial(_to, device), group["update_state"])
        self.engine.reset()

    def _check_not_recorded(self, what: str) -> None:
        if self.recorder is not None:
            raise RuntimeError(
                f"{what}: the steps of this optimizer are recorded, and a replay could not repeat it; "
                "close() the trajectory first, and begin another one or resume it afterwards"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "engine" in state:  # a copy; torch also calls this method to load a state_dict
            self.engine.bind(self)

    def __getstate__(self) -> dict[str, Any]:
        """Supports copies made together with the model; checkpoints use ``state_dict``."""
        own = {"engine": copy.copy(self.engine), "_own_defaults": self._own_defaults}
        return {**super().__getstate__(), **own}

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Takes a step with ``closure``; without one, applies the mean of the pending estimates.

        Args:
            closure: a callable without arguments that evaluates the model on the step's batch and returns
                the loss, a tensor of one element or a float. It runs several times, with gradients
                disabled. If it returns None, as the closures that wrappers pass for ``step()`` do, the
                pending estimates are applied. Alternatively a ``GraphedStep`` of this optimizer.

        Returns:
            The mean of the losses evaluated, float32 [], on the device of the parameters.

        Raises:
            RuntimeError: without a closure and without a preceding ``estimate``, while a round is open, and
                while a CUDA graph is captured: use ``GraphedStep``. Exceptions of ``estimate`` also apply.
        """
        check_not_scaled(self)
        if isinstance(closure, StepExecutor):
            return closure.advance(self.engine)
        if closure is None and initializes_state(self.param_groups):
            self.engine.look()  # which creates residuals
            return torch.full((), torch.nan)
        if closure is not None:
            check_not_skipping(closure)
        step = self.engine.step_pending() if closure is None else self.engine.step(closure)
        return step.estimate.loss

    def merge(self) -> None:
        """Writes to theta what ``LowRank(defer=True)`` holds back; without it there is nothing to write.

        Call it before weights are read in other ways than by a forward, a ``state_dict()`` or a copy of the
        model, and before they are written to: a weight that somebody wrote to while steps were held stays as
        it was written, and a UserWarning names it.

        Raises:
            RuntimeError: within a closure; and, once, for weights that have another shape or no values now,
                so that they cannot take their steps.
        """
        self.engine.run.check_between_closures()
        self.engine.deferral.merge()

    def train(self) -> None:
        """Has no effect. Trainers call it before a forward, for the sake of schedule-free optimizers.

        Raises:
            RuntimeError: if transformers' ``Trainer`` calls it, which would compute gradients next.
        """
        check_not_trainer()

    def estimate(self, closure: Closure) -> Estimate:
        """Evaluates the probes without moving theta.

        ``step()`` applies the mean of all estimates since the last step.

        Several calls before a ``step()`` use the same directions, so with finite differences micro-batches
        of equal size give the estimate of the whole batch: do not divide their losses. Pools select
        separately for each micro-batch, and the step applies the mean of the selections. A call that raises
        discards all pending estimates, and so does ``step(closure)``.

        Args:
            closure: as for ``step``.

        Raises:
            TypeError, ValueError: for a closure that does not return one number.
            FloatingPointError: for a loss that is not finite, with ``nonfinite="raise"``.
            RuntimeError: if the closure changes the parameters of the optimizer, while a round is open,
                and while a CUDA graph is captured: use ``GraphedStep``.
        """
        return self.engine.estimate(closure)

    # Ask and tell

    # The state of a run belongs to the engine, because wrappers of the optimizer share the engine.

    @property
    def probe(self) -> probes.Probe:
        return self.engine.probe

    @property
    def last_estimate(self) -> Estimate | None:
        return self.engine.run.last_estimate

    @property
    def recorder(self) -> Recorder | None:
        return self.engine.run.recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self.engine.run.recorder = recorder

    @property
    def nonfinite_steps(self) -> int:
        """The number of estimates with a loss that was not finite. Waits for the device."""
        return self.engine.watch.count


def unwrap(optimizer: object) -> ZerothOrderOptimizer:
    """Returns the zoext optimizer inside a wrapper (Accelerate, Lightning, Fabric), or the optimizer itself.

    Raises:
        TypeError: if there is none.
    """
    inner = optimizer
    for _ in range(16):  # wrappers may be nested; the bound guards against cycles
        engine = getattr(inner, "engine", None)
        if isinstance(engine, StepEngine) and isinstance(engine.owner, ZerothOrderOptimizer):
            return engine.owner
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            break
    raise TypeError(
        "optimizer must be a ZerothOrderOptimizer or wrap one as its .optimizer, not "
        f"{type(optimizer).__name__}"
    )


def _to(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
