"""A step that fails, however and wherever, leaves every bit as it was; the run goes on as if it had not."""

from __future__ import annotations

import copy
import random
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.faulty_runs import BAD_LOSSES, ERRORS, NAMED, FaultyRun, bytes_of
from support.graphed_runs import same

HALVES = (torch.bfloat16, torch.float16)


def forwards_of(recipe: str) -> int:
    run = FaultyRun(recipe)
    run.step()
    return run.forwards


def fault(run: FaultyRun, number: int, forwards: int, recipe: str) -> None:
    """Fault ``number`` of all kinds at all forwards, in the closure and in a module."""
    kinds = [*ERRORS, *BAD_LOSSES]
    kind, at, in_module = kinds[number % 8], 1 + number // 8 % forwards, number // 8 // forwards % 2 == 1
    if kind in ERRORS:
        with pytest.raises((RuntimeError, MemoryError, KeyboardInterrupt)) as raised:
            run.step(ERRORS[kind], at, in_module=in_module)
        assert run.forwards == at, "it failed elsewhere"
        assert kind == "Ctrl-C" or str(raised.value) == "injected"
    else:  # a pool leaves out candidates whose loss is not finite, so all are to be
        with pytest.raises(FloatingPointError, match="not finite"):
            run.step(BAD_LOSSES[kind], 1 if recipe == "greedy" else at, in_module=in_module)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, "residual"),
        (torch.float16, "residual"),
        (torch.float32, "stochastic"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.float16, "stochastic"),
    ],
)
@pytest.mark.parametrize("recipe", NAMED)
def test_after_a_thousand_faults(recipe: str, dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    """Of each recipe: a sixth of them each with a dtype and a precision."""
    never_faulted = FaultyRun(recipe, dtype, precision=precision)
    run = FaultyRun(recipe, dtype, precision=precision)
    base = copy.deepcopy(run.model)
    forwards = forwards_of(recipe)
    path = tmp_path / "run.jsonl"
    with zoext.Trajectory(path, run.optimizer, frames=True) as trajectory:
        never_faulted.healthy(3)
        run.healthy(3)
        trajectory.flush()
        bits, state, recorded = run.bits(), copy.deepcopy(run.state()), path.read_bytes()
        moments = [
            hooks for module in run.model for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        for number in range(168):
            fault(run, number, forwards, recipe)
            assert run.bits() == bits, number
        assert same(run.state(), state)
        assert not any(moments)
        trajectory.flush()
        assert path.read_bytes() == recorded
        with pytest.raises(RuntimeError, match="nothing to apply"):
            run.optimizer.step()
        never_faulted.healthy(3)
        run.healthy(3)
        assert same(run.state(), never_faulted.state())
        assert run.bits() != bits
    zoext.replay(base, path)
    assert same(dict(base.named_parameters()), dict(run.model.named_parameters()))


@pytest.mark.parametrize("bad", BAD_LOSSES)
@pytest.mark.parametrize("in_module", [False, True])
@pytest.mark.parametrize("recipe", NAMED)
def test_steps_that_are_skipped(recipe: str, bad: str, in_module: bool, tmp_path: Path) -> None:
    """They count, and nothing else of them is left."""
    run = FaultyRun(recipe, torch.bfloat16, precision="residual", nonfinite="skip")
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer, frames=True):
        run.healthy(3)
        bits = run.bits()
        for number in range(5):
            run.step(BAD_LOSSES[bad], in_module=in_module)
            assert run.bits() == bits
            assert run.steps == 4 + number
            assert run.optimizer.nonfinite_steps == 1 + number
        run.healthy(2)
        assert run.bits() != bits
    zoext.replay(base, tmp_path / "run.jsonl")
    assert same(dict(base.named_parameters()), dict(run.model.named_parameters()))


@pytest.mark.parametrize("recipe", NAMED)
def test_interrupted_at_random_moments(recipe: str, tmp_path: Path) -> None:
    """A timer, not a forward, decides when: theta is always that of the step number."""
    steps, generator = 12, random.Random(5)
    never_faulted = FaultyRun(recipe, torch.bfloat16, precision="residual")
    expected = {}
    for step in range(1, steps + 1):
        never_faulted.step()
        expected[step] = never_faulted.bits()
    run = FaultyRun(recipe, torch.bfloat16, precision="residual")
    base, interruptions = copy.deepcopy(run.model), 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer, frames=True):
            run.step()
            while run.steps < steps:
                try:
                    # Ever longer, so that it ends on a machine of any speed.
                    signal.setitimer(
                        signal.ITIMER_REAL, generator.uniform(1e-4, 2e-3 * 1.05 ** (interruptions / 4))
                    )
                    run.step()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interruptions += 1
                assert run.bits() == expected[run.steps]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interruptions > 3
    assert same(run.state(), never_faulted.state())
    zoext.replay(base, tmp_path / "run.jsonl")
    assert same(dict(base.named_parameters()), dict(run.model.named_parameters()))


class Weights(nn.Module):
    """1,000 weights of the size that a transformer has, and no module that would be swapped."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            (torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
        )

    def forward(self) -> Tensor:
        return self.weight.float().square().sum()


def drift(dtype: torch.dtype, precision: str, estimates: int = 1000, fails: bool = False) -> float:
    """Root mean square of what estimates in place leave in 24-bit weights, as a share of theirs."""
    model = Weights(dtype)
    optimizer = zoext.MeZO(model, mu=1e-3, seed=3, probe="inplace", precision=precision)
    before = model.weight.detach().double()
    for number in range(estimates):
        optimizer.param_groups[0]["step"] = number  # another direction
        losses = iter([model] if fails else [model, model])
        with suppress(StopIteration):
            optimizer.estimate(lambda losses=losses: next(losses)())
    state = optimizer.state[model.weight]
    after = with_residual(model.weight.detach(), state.get("residual"))
    return float((after - before).square().mean().sqrt() / before.square().mean().sqrt())


def with_residual(weight: Tensor, residual: Tensor | None) -> Tensor:
    """The value of weights of 24 bits: the residual counts 256ths of the distance between neighbours."""
    value = weight.double()
    if residual is None:
        return value
    away = torch.nextafter(weight, torch.full_like(weight, torch.inf).copysign(weight)).double()
    return value + (away - value) * residual.double() / 256


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_in_place_probes_of_residual_weights_hardly_drift(dtype: torch.dtype, fails: bool) -> None:
    nearest, residual = (drift(dtype, precision, fails=fails) for precision in ("nearest", "residual"))
    assert nearest > 1e-3
    assert residual < nearest / 100


def test_in_place_probes_are_never_rounded_at_random() -> None:
    assert drift(torch.bfloat16, "stochastic", 20) == drift(torch.bfloat16, "nearest", 20)


@pytest.mark.parametrize("dtype", HALVES)
def test_in_place_updates_after_faults_still_move(dtype: torch.dtype) -> None:
    run = FaultyRun("mezo", dtype, precision="residual", probe="inplace")
    before = bytes_of(run.model[0].weight)
    with pytest.raises(RuntimeError, match="injected"):
        run.step(ERRORS["error"], 2)
    assert run.steps == 0
    run.healthy(2)
    assert run.steps == 2
    assert bytes_of(run.model[0].weight) != before
