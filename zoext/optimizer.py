"""The optimizer: the contract of torch.optim over the step engine."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zoext import noise, probes
from zoext._engine import (
    Axes,
    Closure,
    NonfiniteWatch,
    OpenRound,
    Recorder,
    StepEngine,
    StepExecutor,
    with_current_names,
)
from zoext._parameters import group_options, parameters
from zoext._parameters.precision import checked_state, own_state, rounding_of
from zoext.directions import Direction, Gaussian
from zoext.estimators import CentralDifference, Estimate, Estimator
from zoext.updates import SGD, Update


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Fine-tunes with forward passes only: any direction with any estimator and any update.

    A step evaluates the closure at displaced weights, turns the losses into a gradient estimate
    ``sum_k c_k D(s_k)`` and moves theta along it. It is a drop-in torch.optim.Optimizer: parameter
    groups with ``lr``, ``mu`` and ``weight_decay``, schedulers, hooks, and a ``state_dict`` of plain
    data from which training continues bit for bit. Profilers see its phases, ``zoext.estimate`` (with
    ``zoext.perturb``, ``zoext.forward`` and ``zoext.restore`` in it) and ``zoext.update``, as events.

        optimizer = zoext.ZerothOrderOptimizer(model, estimator=zoext.ForwardDifference(samples=4), lr=1e-5)
        loss = optimizer.step(lambda: model(x).square().mean())

    With streamed probes, three ways to take a step leave the same bits: ``step(closure)``;
    ``estimate(closure)``, once or for each micro-batch, and ``step()``; or ``ask`` and ``tell``, with losses
    that are computed elsewhere.

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
        precision: rounding of updates to 16-bit weights. "nearest" loses every update of less than half a
            unit in the last place. "stochastic" (default) rounds up with the probability that makes the
            expectation exact; the random bits come from the noise field. "residual" keeps what rounding
            loses in an int8 beside each weight (``state[parameter]["residual"]``): theta moves like a 24-bit
            float, and the closure sees the nearest 16-bit one. Has no effect on 32- and 64-bit weights.

    Attributes:
        last_estimate: the estimate that the last step applied; None before the first.
        recorder: receives every step, such as a ``Trajectory``; None if there is none.
        nonfinite_steps: how many estimates had a loss that was not finite.
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
        nonfinite: str = "raise",
        precision: str = "stochastic",
    ) -> None:
        axes = Axes(direction or Gaussian(), estimator or CentralDifference(), update or SGD())
        axes.check()
        watch, rounding = NonfiniteWatch(nonfinite), rounding_of(precision)
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
        self.engine = StepEngine(self, axes, module, probes.choose(probe, whole), rounding, watch)
        given: Any = params if whole is None else list(whole.named_parameters())
        super().__init__(given, dict(self._own_defaults))
        axes.direction.check(module, parameters.trainable(self.param_groups))

    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its parameters take the next keys, those of the others do not change.

        Raises:
            RuntimeError: while the steps are recorded.
        """
        self._check_not_recorded("add_param_group")
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
            RuntimeError: after an update that raised halfway: loading the state would hide that.
        """
        self.engine.check_whole()
        return super().state_dict()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        recipe, precision = self.engine.axes.recipe(), self._own_defaults["precision"]
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            if missing := self._own_defaults.keys() - group.keys():
                raise ValueError(
                    f"state_dict has no {', '.join(sorted(missing))}: it is not that of a zoext optimizer"
                )
            group["recipe"] = with_current_names(group["recipe"])
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
        for group, saved in zip(self.param_groups, groups, strict=False):
            for tensor, name in zip(group["params"], saved["params"], strict=False):  # torch compares lengths
                if own := state.pop(name, None):
                    state[name] = checked_state(tensor, own)
        return {**state_dict, "state": state, "param_groups": groups}

    def _settle(self) -> None:
        """Makes loaded data this optimizer's own."""
        for tensor, own in self.state.items():
            self.state[tensor] = own_state(tensor, own)
        for group in self.param_groups:
            device = group["params"][0].device if group["params"] else torch.device("cpu")
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
        if "engine" in state:  # a copy; torch also loads a state_dict by this method
            self.engine.bind(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, made together with the model; checkpoints are made of ``state_dict``."""
        own = {"engine": copy.copy(self.engine), "_own_defaults": self._own_defaults}
        return {**super().__getstate__(), **own}

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Moves theta by the estimate with ``closure``, or without one by the mean of the pending estimates.

        Args:
            closure: takes nothing, evaluates the model on the step's batch and returns the loss, a
                tensor of one element or a float. Runs several times, without gradients. Or a
                ``GraphedStep`` of this optimizer. One that returns None, as wrappers pass for ``step()``,
                applies the pending estimates.

        Returns:
            The mean of the losses evaluated, float32 [], on the device of the parameters.

        Raises:
            RuntimeError: without a closure and without a preceding ``estimate``, while a round is open, and
                while a CUDA graph is captured: use ``GraphedStep``. Also what ``estimate`` raises.
        """
        if isinstance(closure, StepExecutor):
            return closure.advance(self.engine)
        step = self.engine.step_pending() if closure is None else self.engine.step(closure)
        return step.estimate.loss

    def estimate(self, closure: Closure) -> Estimate:
        """Evaluates the probes without moving theta.

        ``step()`` applies the mean of all estimates since the last step.

        Several calls before a ``step()`` see the same directions, so with finite differences equal
        micro-batches give the estimate of the whole batch: do not divide their losses. Pools choose for
        each micro-batch on its own, and the step takes the mean of what was chosen. A call that raises
        discards all pending estimates; ``step(closure)`` does too.

        Args:
            closure: as for ``step``.

        Raises:
            TypeError, ValueError: for a closure that does not return one number.
            FloatingPointError: for a loss that is not finite, with ``nonfinite="raise"``.
            RuntimeError: for a closure that changes the parameters of the optimizer, while a round is open,
                and while a CUDA graph is captured: use ``GraphedStep``.
        """
        return self.engine.estimate(closure)

    # Ask and tell

    def ask(self) -> OpenRound:
        """Begins an estimate whose losses are computed elsewhere, and returns its first round of probes.

            round = optimizer.ask()
            while round is not None:
                losses = []
                for i in range(len(round)):
                    with round.displaced(i):
                        losses.append(loss_of(model))
                round = optimizer.tell(losses)
            optimizer.step()

        leaves the bits of ``optimizer.step(lambda: loss_of(model))`` with streamed probes, if the losses are
        told in the dtype that the closure returns. Probes may be evaluated elsewhere: hand
        ``round.adapter(i)`` to an inference engine, or have each of several processes with the same
        optimizer ask, evaluate some of the probes, and tell all losses.

        Raises:
            RuntimeError: while a round is open, and as ``estimate``.
        """
        return self.engine.ask()

    def tell(self, losses: Tensor | Sequence[float | Tensor]) -> OpenRound | None:
        """Takes the losses of the open round, and returns the next one.

        Args:
            losses: one for each probe of the round, in its order: a tensor [P], or P numbers. Python floats
                count as float64; pass ``torch.tensor(losses)`` for the bits of float32 losses.

        Returns:
            The next round, or None once the estimate is complete: ``step()`` applies it, alone or with
            others that were made before.

        Raises:
            RuntimeError: before ``ask``, and if the list of parameters, their memory, ``requires_grad`` or a
                group's ``mu`` changed since; that cancels the round.
            ValueError: for another number of losses. The round stays open.
            FloatingPointError: for losses that are not finite, with ``nonfinite="raise"``.
        """
        return self.engine.tell(losses)

    def cancel(self) -> None:
        """Drops the open round, if there is one; estimates that are complete stay pending."""
        self.engine.run.cancel_round()

    # What a run changes is in the engine, which wrappers of the optimizer share.

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
        """How many estimates had a loss that was not finite, since this object was made. Waits for them."""
        return self.engine.watch.count


def unwrap(optimizer: object) -> ZerothOrderOptimizer:
    """The optimizer of zoext inside those of Accelerate, Lightning and Fabric, or itself.

    Raises:
        TypeError: if there is none.
    """
    inner = optimizer
    for _ in range(16):  # wrappers may be nested, but not without end
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
