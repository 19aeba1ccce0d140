"""A replay leaves the bits of the run, whatever the recipe, the dtype, the rounding and the machine."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoext
from support.faulty_runs import BAD_LOSSES, NAMED, FaultyRun
from support.graphed_runs import RECIPES, Run, same
from support.trajectory_files import forge, record, records
from zoext import _C
from zoext._engine import StepEngine
from zoext.trajectory._replay import part_replay

PRECISIONS = ("nearest", "stochastic", "residual")
DTYPES = [(torch.float32, "stochastic"), (torch.float64, "nearest")]
DTYPES += [(dtype, precision) for dtype in (torch.bfloat16, torch.float16) for precision in PRECISIONS]
STEPS = 5


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def remembered(optimizer: zoext.ZerothOrderOptimizer) -> Any:
    """All of an optimizer's state that a replay can know: not what schedulers keep in it."""
    state = optimizer.state_dict()
    names = ("step", "seed", "recipe", "precision", "mu", "weight_decay", "update_state")
    groups = [{name: group[name] for name in names} for group in state["param_groups"]]
    return copy.deepcopy([state["state"], groups])


@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_to_every_step(recipe: str, dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    """With weight decay and a scheduler; the optimizer is that of the run as well."""
    run = Run(recipe, graphed=False, dtype=dtype, precision=precision)
    base, path = copy.deepcopy(run.model), tmp_path / "run.jsonl"
    expected = []
    with zoext.Trajectory(path, run.optimizer, frames=True):
        for step in range(STEPS):
            run.step(step)
            expected.append((parameters(run.model), remembered(run.optimizer)))
    untouched = copy.deepcopy(base)
    assert zoext.replay(untouched, path, to_step=0).param_groups[0]["step"] == 0
    assert same(parameters(untouched), parameters(base))
    for step, (weights, state) in enumerate(expected, 1):
        model = copy.deepcopy(base)
        optimizer = zoext.replay(model, path, to_step=step)
        assert same(parameters(model), weights), step
        assert same(remembered(optimizer), state), step
    assert not same(expected[0][0], expected[-1][0])


@pytest.mark.parametrize("recipe", ["mezo", "adamezo", "lozo", "agzo"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_around_the_borders_of_what_is_done_at_once(recipe: str, precision: str, tmp_path: Path) -> None:
    at_once = part_replay.AT_ONCE if recipe in ("mezo", "adamezo") else part_replay.AT_ONCE_FACTORED
    run, path, expected = FaultyRun(recipe, torch.bfloat16, precision=precision), tmp_path / "run.jsonl", {}
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(path, run.optimizer, frames=True):
        for step in range(1, 2 * at_once + 4):
            run.step()
            expected[step] = parameters(run.model)
    for step in (1, 2, at_once - 1, at_once, at_once + 1, 2 * at_once, 2 * at_once + 1, 2 * at_once + 3):
        model = copy.deepcopy(base)
        zoext.replay(model, path, to_step=step)
        assert same(parameters(model), expected[step]), step


@pytest.mark.parametrize("how", ["model", "optimizer"])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "nearest"), (torch.bfloat16, "residual")])
@pytest.mark.parametrize("recipe", NAMED)
def test_training_goes_on_as_if_it_had_never_stopped(
    recipe: str, dtype: torch.dtype, precision: str, how: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    _, uninterrupted = record(path, 7, recipe, dtype, precision=precision)
    for step in (1, 4, 7):
        run = FaultyRun(recipe, dtype, precision=precision)
        replayed = zoext.replay(run.model if how == "model" else run.optimizer, path, to_step=step)
        assert (replayed is run.optimizer) == (how == "optimizer")
        run.optimizer = replayed
        run.healthy(9 - step)
        if step == 1:
            uninterrupted.healthy(2)
        assert same(parameters(run.model), parameters(uninterrupted.model)), step
        assert same(remembered(run.optimizer), remembered(uninterrupted.optimizer)), step


@pytest.mark.parametrize("recipe", ["mezo", "adamezo", "agzo", "lozo"])
@pytest.mark.parametrize("threads", [1, 2])
def test_with_other_threads_and_instructions_than_the_run(
    recipe: str, threads: int, tmp_path: Path, set_threads: Callable[[int], None], instruction_set: str
) -> None:
    torch.manual_seed(2)
    model, x = (
        nn.Sequential(nn.Linear(130, 257), nn.GELU(), nn.Linear(257, 67)).bfloat16(),
        torch.randn(3, 130),
    )
    base, path = copy.deepcopy(model), tmp_path / "run.jsonl"
    optimizer = RECIPES[recipe](model, lr=1e-2, mu=1e-2, weight_decay=0.1)
    set_threads(3 - threads)
    _C.use_instruction_set(_C.available_instruction_sets()[-1])
    with zoext.Trajectory(path, optimizer, frames=True):
        for _ in range(3):
            optimizer.step(lambda: model(x.bfloat16()).float().square().mean())
    set_threads(threads)
    _C.use_instruction_set(instruction_set)
    zoext.replay(base, path)
    assert same(parameters(base), parameters(model))


@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_with_everything(recipe: str, dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    """Groups of their own lr, mu and decay, tensors as lr, layers frozen and thawed, losses that are bad."""
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 6), nn.Linear(6, 3)).to(
        dtype
    )
    groups = [
        {"params": model[0].named_parameters(), "lr": torch.tensor(0.03), "mu": 0.03},
        {"params": [("norm", model[1].weight), ("shift", model[1].bias)], "weight_decay": 0.3},
        {"params": model[3].named_parameters(), "lr": torch.tensor(0.07, dtype=torch.float64)},
        {"params": model[4].named_parameters(), "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": 0.05, "mu": 0.02, "weight_decay": 0.1, "seed": -3, "nonfinite": "skip"}
    optimizer = RECIPES[recipe](groups, **settings, precision=precision, probe=zoext.StreamedProbe(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
    base, path, x = copy.deepcopy(model), tmp_path / "run.jsonl", torch.randn(4, 5).to(dtype)
    frozen = {2: [3], 3: [3, 1], 6: [0]}
    with zoext.Trajectory(path, optimizer, frames=True):
        for step in range(8):
            for layer in (0, 1, 3):
                model[layer].requires_grad_(layer not in frozen.get(step, []))
            bad = float("nan") if step in (1, 5) else 0.0
            optimizer.step(lambda bad=bad: model(x).float().square().mean() + bad)
            scheduler.step()
            optimizer.param_groups[1]["mu"] = 0.02 + 0.01 * (step > 4)
    assert optimizer.nonfinite_steps == 2
    zoext.replay(base, path)
    assert same(parameters(base), parameters(model))
    assert [tensor.requires_grad for tensor in base.parameters()] == [True] * 8


@pytest.mark.parametrize("bad", BAD_LOSSES)
@pytest.mark.parametrize("recipe", NAMED)
def test_losses_of_which_some_are_not_finite(recipe: str, bad: str, tmp_path: Path) -> None:
    """Pools leave candidates out and go on with the others."""
    run, path = FaultyRun(recipe, torch.bfloat16, nonfinite="skip"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(path, run.optimizer, frames=True):
        for at in (2, 9, 3, 1, 9, 4):
            run.step(BAD_LOSSES[bad], at)
    zoext.replay(base, path)
    assert same(parameters(base), parameters(run.model))
    assert [row["step"] for row in records(path)[1:]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "nearest"), (torch.float16, "residual")])
@pytest.mark.parametrize("recipe", ["mezo", "adamezo", "agzo", "lozo"])
def test_recording_goes_on_from_any_step(
    recipe: str, dtype: torch.dtype, precision: str, tmp_path: Path
) -> None:
    """A checkpoint of each step, and the file as it was at the end, or torn behind it."""
    whole, checkpoints = tmp_path / "whole.jsonl", []
    run = FaultyRun(recipe, dtype, precision=precision)
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(whole, run.optimizer, frames=True):
        for _ in range(6):
            checkpoints.append(copy.deepcopy(run.state()))
            run.step()
    for step, (weights, state) in enumerate(checkpoints):
        path = tmp_path / f"{step}.jsonl"
        path.write_bytes(whole.read_bytes() + b'{"step":7,"see')
        if recipe == "agzo":
            shutil.copy(whole.with_suffix(".frames"), path.with_suffix(".frames"))
        again = FaultyRun(recipe, dtype, precision=precision)
        again.model.load_state_dict(weights)
        again.optimizer.load_state_dict(state)
        with zoext.Trajectory(path, again.optimizer, resume=True):
            again.healthy(6 - step)
        model = copy.deepcopy(base)
        zoext.replay(model, path)
        assert same(parameters(model), parameters(run.model))
        assert path.read_bytes() == whole.read_bytes()
        if recipe == "agzo":
            files = [each.with_suffix(".frames").read_bytes() for each in (path, whole)]
            assert files[0] == files[1]


@pytest.mark.parametrize(("former", "balance"), [("printed", "paper"), ("still", "freeze")])
def test_names_of_earlier_versions_are_read(former: str, balance: str, tmp_path: Path) -> None:
    """Values of options that have been renamed since."""
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    run.optimizer = zoext.AGZO(run.model, lr=1e-2, balance=balance)
    with zoext.Trajectory(path, run.optimizer, frames=True):
        run.healthy(3)
    forge(path, 1, lambda row: row["recipe"]["direction"].update(balance=former))
    zoext.Trajectory(path, run.optimizer, resume=True).close()
    assert records(path)[0]["recipe"]["direction"]["balance"] == former
    assert zoext.replay(base, path).param_groups[0]["recipe"]["direction"]["balance"] == balance
    assert same(parameters(base), parameters(run.model))


def test_recording_goes_on_many_times(tmp_path: Path) -> None:
    run, path = FaultyRun("adamezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    for number in range(5):
        with zoext.Trajectory(path, run.optimizer, resume=number > 0):
            run.healthy(number)
    zoext.replay(base, path)
    assert same(parameters(base), parameters(run.model))


def test_a_sum_of_trajectories(tmp_path: Path) -> None:
    """In float64, without decay, it is the sum of the changes to rounding; in any case it is repeatable."""
    paths, changes = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], []
    for seed, path in enumerate(paths):
        base, run = record(path, 4, "mezo", torch.float64, seed=seed, weight_decay=0.0)
        changes.append(
            {k: v - dict(base.named_parameters())[k].detach() for k, v in parameters(run.model).items()}
        )
    models = [copy.deepcopy(base) for _ in range(3)]
    for model in models[:2]:
        zoext.replay(model, paths)
    zoext.replay(models[2], paths[:1])
    assert same(parameters(models[0]), parameters(models[1]))
    for name, tensor in parameters(models[0]).items():
        expected = dict(base.named_parameters())[name].detach() + changes[0][name] + changes[1][name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-14)
        assert not torch.equal(tensor, parameters(models[2])[name])


def test_a_sum_is_of_whole_trajectories_on_a_model(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    base, _ = record(path)
    for target, paths, options in [
        (base, [path, path], {"to_step": 2}),
        (base, [], {}),
        (FaultyRun("mezo").optimizer, [path, path], {}),
    ]:
        with pytest.raises(ValueError, match="several trajectories"):
            zoext.replay(target, paths, **options)


@pytest.mark.parametrize("to_step", [2.0, "2", True])
def test_a_step_that_is_no_integer(to_step: Any, tmp_path: Path) -> None:
    base, _ = record(tmp_path / "run.jsonl")
    before = parameters(base)
    with pytest.raises(TypeError, match=f"to_step must be an integer, not {to_step!r}"):
        zoext.replay(base, tmp_path / "run.jsonl", to_step=to_step)
    assert same(parameters(base), before)


def test_a_replay_that_is_interrupted_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_replay, "AT_ONCE", 2)
    base, _ = record(tmp_path / "run.jsonl", 5)
    real, calls = StepEngine.apply, []

    def take(self: StepEngine, steps: Any) -> None:
        calls.append(steps)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, steps)

    monkeypatch.setattr(StepEngine, "apply", take)
    with pytest.raises(KeyboardInterrupt) as raised:
        zoext.replay(base, tmp_path / "run.jsonl")
    assert "run.jsonl: the weights are now those of step 2" in raised.value.__notes__[0]


@pytest.mark.parametrize("to_step", [-1, 5, 2**70])
def test_steps_that_there_are_not(to_step: int, tmp_path: Path) -> None:
    base, _ = record(tmp_path / "run.jsonl")
    before = parameters(base)
    with pytest.raises(ValueError, match=rf"to_step must be at (least 0|most 4).*not {to_step}"):
        zoext.replay(base, tmp_path / "run.jsonl", to_step=to_step)
    assert same(parameters(base), before)


def test_frozen_weights_of_another_kind_are_left_alone(tmp_path: Path) -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(0)))
            self.codes = nn.Parameter(torch.arange(4), requires_grad=False)
            self.empty = nn.Parameter(torch.empty(0))

        def forward(self) -> torch.Tensor:
            return (self.weight * self.codes).square().sum()

    model, path = Quantised(), tmp_path / "run.jsonl"
    with zoext.Trajectory(path, optimizer := zoext.MeZO(model, lr=0.1)):
        optimizer.step(model)
    for step in (0, 1):
        replayed = Quantised()
        zoext.replay(replayed, path, to_step=step)
        assert not replayed.codes.requires_grad
    assert same(parameters(replayed), parameters(model))


def test_a_run_of_twenty_thousand_steps_takes_some_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run = FaultyRun("mezo", torch.bfloat16)
    run.optimizer = zoext.MeZO(run.model, lr=1.2345678901234567e-06, weight_decay=0.1)
    run.optimizer.param_groups[0]["step"] = 19_900
    with zoext.Trajectory(path, run.optimizer):
        run.healthy(100)
    header, *lines = path.read_bytes().splitlines(keepends=True)
    assert sum(map(len, lines)) / len(lines) * 20_000 + len(header) < 6e6
    assert len(header) / 8 < 300  # a parameter


@pytest.mark.parametrize(
    ("dtype", "precision", "near"),
    [(torch.float32, "nearest", 1e-4), (torch.float64, "nearest", 1e-12), (torch.bfloat16, "residual", 0.02)],
)
def test_runs_with_probes_in_place_are_near_and_say_so(
    dtype: torch.dtype, precision: str, near: float, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    run = FaultyRun("mezo", dtype, precision=precision, probe="inplace")
    base = copy.deepcopy(run.model)
    with pytest.warns(UserWarning, match=r"inplace.*near the run"):
        trajectory = zoext.Trajectory(path, run.optimizer)
    run.healthy(20)
    trajectory.close()
    with pytest.warns(UserWarning, match=r"run\.jsonl: .*near the run, but not equal"):
        zoext.replay(base, path)
    for a, b in zip(base.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)
    streamed = FaultyRun("mezo", dtype, precision=precision)
    streamed.optimizer.load_state_dict(run.optimizer.state_dict())
    with pytest.raises(zoext.TrajectoryError, match="its exact is False"):
        zoext.Trajectory(path, streamed.optimizer, resume=True)


def test_estimates_of_before_a_replay_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path)
    run = FaultyRun("mezo")
    run.optimizer.estimate(lambda: run.model(torch.ones(4, 3)).square().mean())
    zoext.replay(run.optimizer, path)
    with pytest.raises(RuntimeError, match="nothing to apply"):
        run.optimizer.step()


def test_a_round_of_before_a_replay_is_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path)
    run = FaultyRun("mezo")
    losses = [1.0] * len(run.optimizer.ask())
    zoext.replay(run.optimizer, path)
    with pytest.raises(RuntimeError, match="without an open round"):
        run.optimizer.tell(losses)
    run.step()


def test_the_generators_of_torch_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    base, _ = record(path)
    before = torch.get_rng_state()
    zoext.replay(base, path)
    assert torch.equal(torch.get_rng_state(), before)
