"""What is recorded of runs of every kind, and what a recording refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoext
from support.faulty_runs import NAMED, FaultyRun
from support.graphed_runs import Run, same
from support.recorded_graph import RecordedGraph
from support.trajectory_files import assert_replays, records, steps_in
from zoext._engine import StepEngine
from zoext.trajectory._writer import pieces


def test_two_trajectories_of_one_optimizer(tmp_path: Path) -> None:
    run = FaultyRun("mezo")
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer):
        with pytest.raises(ValueError, match="recorded already; close"):
            zoext.Trajectory(tmp_path / "other.jsonl", run.optimizer)
        run.step()
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_run_in_pieces_and_after_loading_a_state(tmp_path: Path) -> None:
    run = FaultyRun("lozo", torch.bfloat16)
    run.healthy(2)
    loaded = FaultyRun("lozo", torch.bfloat16)
    loaded.model.load_state_dict(run.model.state_dict())
    loaded.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    base = copy.deepcopy(loaded.model)
    with zoext.Trajectory(tmp_path / "run.jsonl", loaded.optimizer):
        loaded.healthy(2)
    model = copy.deepcopy(base)
    assert zoext.replay(model, tmp_path / "run.jsonl").param_groups[0]["step"] == 4
    assert same(dict(model.named_parameters()), dict(loaded.model.named_parameters()))
    with pytest.raises(ValueError, match="to_step must be at least 2"):
        zoext.replay(base, tmp_path / "run.jsonl", to_step=1)


@pytest.mark.parametrize("precision", ["nearest", "residual"])
def test_what_an_optimizer_remembers_must_be_in_the_trajectory(precision: str, tmp_path: Path) -> None:
    run = FaultyRun("adamezo" if precision == "nearest" else "mezo", torch.bfloat16, precision=precision)
    run.healthy(2)
    with pytest.raises(ValueError, match="at step 2, its next step depends on earlier ones"):
        zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    run = FaultyRun("mezo")
    with pytest.raises(FileNotFoundError):
        zoext.Trajectory(tmp_path / "no" / "run.jsonl", run.optimizer)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        zoext.Trajectory(tmp_path / "file" / "run.jsonl", run.optimizer)
    run.step()


@pytest.mark.parametrize("taken", ["run.jsonl", "run.frames"])
def test_a_path_that_exists(taken: str, tmp_path: Path) -> None:
    (tmp_path / taken).write_text("precious")
    run = FaultyRun("agzo")
    with pytest.raises(FileExistsError, match=rf"{taken} exists; .*resume=True"):
        zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer, frames=True)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(taken, "precious")]
    run.step()


def test_a_path_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names it, and nothing that is internal."""
    monkeypatch.chdir(tmp_path)
    optimizer = FaultyRun("mezo").optimizer
    for path in ("", ".", tmp_path):
        with pytest.raises(IsADirectoryError, match=r"path must be a file") as raised:
            zoext.Trajectory(path, optimizer)
        assert raised.value.filename == str(Path(path))
    missing = tmp_path / "none" / "run.jsonl"
    with pytest.raises(FileNotFoundError, match=f"its folder {missing.parent} is missing") as raised:
        zoext.Trajectory(missing, optimizer)
    assert raised.value.filename == str(missing)
    for name in ("x" * 255, "x" * 300):  # a name that is as long as can be, and one that is longer
        with pytest.raises(OSError, match="too long") as raised:
            zoext.Trajectory(tmp_path / name, optimizer)
        assert raised.value.filename == str(tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert optimizer.recorder is None


def test_a_relative_path_is_that_of_where_recording_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = FaultyRun("agzo")
    with zoext.Trajectory("run.jsonl", run.optimizer, frames=True) as trajectory:
        run.step()
        monkeypatch.chdir(tmp_path / "elsewhere")
        run.step()
        trajectory.flush()
        run.step()
    assert steps_in(tmp_path / "run.jsonl") == [1, 2, 3]
    assert not list(Path().iterdir())


def test_notes_that_no_file_can_hold(tmp_path: Path) -> None:
    optimizer = FaultyRun("mezo").optimizer
    for notes, error in (({"loss": float("nan")}, ValueError), ({"weights": torch.ones(2)}, TypeError)):
        with pytest.raises(error, match="notes must be what JSON can hold"):
            zoext.Trajectory(tmp_path / "run.jsonl", optimizer, notes=notes)
    assert optimizer.recorder is None
    assert not list(tmp_path.iterdir())


def test_numbers_of_a_group_that_are_none_are_refused_before_theta_moves(tmp_path: Path) -> None:
    """Also where they were set between the estimate and the step."""
    run, path = FaultyRun("mezo", lr=torch.tensor(0.5)), tmp_path / "run.jsonl"
    group = run.optimizer.param_groups[0]

    def refused(name: str, value: float | torch.Tensor) -> None:
        good = group[name]
        for between in (False, True):
            if between:
                run.optimizer.estimate(lambda: run.model(torch.ones(4, 3)).square().sum())
            before = run.bits()  # after the estimate, which moves running statistics
            group[name] = value
            with pytest.raises(ValueError, match=f"{name} must be finite"):
                run.optimizer.step() if between else run.step()
            group[name] = good
            assert run.bits() == before

    with zoext.Trajectory(path, run.optimizer):
        run.step()
        for bad in (float("nan"), float("inf")):
            refused("lr", torch.tensor(bad))
            refused("lr", bad)
            refused("weight_decay", bad)
        run.step()
    assert steps_in(path) == [1, 2]


def test_a_step_that_no_line_can_hold_is_told_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one with an lr that is no number on a GPU, where nobody looked."""
    run, path = FaultyRun("mezo", lr=torch.tensor(0.5)), tmp_path / "run.jsonl"
    monkeypatch.setattr("zoext._parameters.group_options.check_on_host", lambda options: None)
    trajectory = zoext.Trajectory(path, run.optimizer)
    run.step()
    trajectory.flush()
    run.optimizer.param_groups[0]["lr"].fill_(float("nan"))
    run.step()
    run.optimizer.param_groups[0]["lr"].fill_(0.5)
    for again in (trajectory.flush, run.step, run.step, trajectory.close):
        with pytest.raises(zoext.TrajectoryError, match=r"run.jsonl: step 2 cannot be recorded.*close\(\)"):
            again()
    run.model.load_state_dict(FaultyRun("mezo").model.state_dict())
    run.step()
    assert steps_in(path) == [1]


def test_a_schedule_of_mu_repeats_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the file nor in the replay, which still takes many steps at once."""
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(path, run.optimizer):
        for step in range(9):
            run.optimizer.param_groups[0]["mu"] = 1e-2 / (step + 1)
            run.optimizer.param_groups[0]["weight_decay"] = 0.25 * (step // 4)
            run.step()
    _, *steps = records(path)
    assert all("mu" in step for step in steps)
    assert [number for number, step in enumerate(steps) if "weight_decay" in step] == [0, 4, 8]
    assert [number for number, step in enumerate(steps) if "moves" in step] == [0]
    calls: list[int] = []
    real = StepEngine.apply

    def counted(self: StepEngine, steps: Sequence[Any]) -> None:
        calls.append(len(steps))
        real(self, steps)

    monkeypatch.setattr(StepEngine, "apply", counted)
    assert_replays(base, path, run)
    assert calls == [9]


@pytest.mark.parametrize("recipe", ["mezo", "adamezo"])
def test_a_replay_in_mid_run_is_refused(recipe: str, tmp_path: Path) -> None:
    path, run = tmp_path / "run.jsonl", FaultyRun(recipe)
    with zoext.Trajectory(path, run.optimizer):
        run.healthy(2)
    other = FaultyRun(recipe)
    with zoext.Trajectory(tmp_path / "other.jsonl", other.optimizer):
        before = copy.deepcopy(other.state())
        with pytest.raises(RuntimeError, match=r"replay: the steps.*close\(\)"):
            zoext.replay(other.optimizer, path)
        assert same(other.state(), before)
        other.healthy(1)
    assert steps_in(tmp_path / "other.jsonl") == [1]


@pytest.mark.parametrize("recipe", ["mezo", "adamezo"])
def test_loading_a_state_in_mid_run_is_refused(recipe: str, tmp_path: Path) -> None:
    """Also one of the same step, which no line would show."""
    run, path = FaultyRun(recipe), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    other = FaultyRun(recipe, seed=99)
    with zoext.Trajectory(path, run.optimizer) as trajectory:
        run.healthy(2)
        other.healthy(2)
        before = copy.deepcopy(run.state())
        with pytest.raises(RuntimeError, match=r"load_state_dict.*close\(\)"):
            run.optimizer.load_state_dict(other.optimizer.state_dict())
        assert same(run.state(), before)
        run.step()
        trajectory.close()
        run.optimizer.load_state_dict(other.optimizer.state_dict())
        run.step()
    assert steps_in(path) == [1, 2, 3]
    zoext.replay(base, path)


def test_adding_a_group_in_mid_run_is_refused(tmp_path: Path) -> None:
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"
    extra = nn.Parameter(torch.ones(2))
    with zoext.Trajectory(path, run.optimizer) as trajectory:
        run.step()
        with pytest.raises(RuntimeError, match=r"add_param_group.*close\(\)"):
            run.optimizer.add_param_group({"params": [("extra", extra)]})
        assert len(run.optimizer.param_groups) == 1
        run.step()
        trajectory.close()
        run.optimizer.add_param_group({"params": [("extra", extra)]})
    assert steps_in(path) == [1, 2]


def test_a_step_number_that_was_changed_by_hand(tmp_path: Path) -> None:
    run = FaultyRun("mezo")
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer):
        run.step()
        run.optimizer.param_groups[0]["step"] = 7
        with pytest.raises(RuntimeError, match="at step 1 when its last step was recorded and is at"):
            run.step()
        run.optimizer.param_groups[0]["step"] = 1
        run.step()


def test_a_step_that_could_not_be_recorded_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file ends before it, instead of having a gap."""
    run, path = FaultyRun("mezo"), tmp_path / "run.jsonl"

    def fails(*_: object) -> None:
        raise MemoryError("injected")

    with zoext.Trajectory(path, run.optimizer):
        run.step()
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "to_host", fails)
            with pytest.raises(MemoryError):
                run.step()
        with pytest.raises(RuntimeError, match="close"):
            run.step()
    assert steps_in(path) == [1]


def test_a_copy_of_the_optimizer_is_not_recorded(tmp_path: Path) -> None:
    run, path = FaultyRun("adamezo"), tmp_path / "run.jsonl"
    base = copy.deepcopy(run.model)
    with zoext.Trajectory(path, run.optimizer):
        run.healthy(2)
        twin = copy.deepcopy(run)
        assert twin.optimizer.recorder is None
        twin.healthy(5)
        run.healthy(1)
    assert steps_in(path) == [1, 2, 3]
    assert_replays(base, path, run)
    run.healthy(4)
    assert same(run.state(), twin.state())


def test_a_line_of_a_run_with_everything(tmp_path: Path) -> None:
    """Groups of their own lr, mu and decay, a scheduler, tensors as lr, layers frozen and thawed."""
    run = FaultyRun("mezo")
    path = tmp_path / "run.jsonl"
    groups = [
        {"params": list(run.model[0].parameters()), "lr": torch.tensor(0.25), "mu": 0.5},
        {"params": list(run.model[3].parameters()), "lr": torch.tensor(0.125, dtype=torch.float64)},
        {"params": list(run.model[1].parameters()), "weight_decay": 0.25},
    ]
    optimizer = zoext.MeZO(groups, lr=0.5, mu=0.25, probe=zoext.StreamedProbe(run.model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    x, base = torch.ones(4, 3), copy.deepcopy(run.model)
    with zoext.Trajectory(path, optimizer, notes={"what": "everything"}):
        for step in range(5):
            run.model[3].requires_grad_(step != 2)
            optimizer.step(lambda: run.model(x).square().mean())
            scheduler.step()
    header, *steps = records(path)
    assert header["notes"] == {"what": "everything"}
    names = [[parameter["name"] for parameter in group["parameters"]] for group in header["groups"]]
    assert names == [["0.weight", "0.bias"], ["3.weight", "3.bias"], ["1.weight", "1.bias"]]
    assert [row["lr"] for row in steps] == [[0.25 / 2**n, 0.125 / 2**n, 0.5 / 2**n] for n in range(5)]
    assert [row.get("moves") for row in steps] == [[[0, 6]], None, [[0, 2], [4, 6]], [[0, 6]], None]
    assert steps[0]["mu"] == [0.5, 0.25, 0.25]
    assert steps[0]["weight_decay"] == [0.0, 0.0, 0.25]
    zoext.replay(base, path)
    assert same(dict(base.named_parameters()), dict(run.model.named_parameters()))


@pytest.mark.parametrize("recipe", NAMED)
def test_micro_batches(recipe: str, tmp_path: Path) -> None:
    path, run = tmp_path / "run.jsonl", FaultyRun(recipe, torch.bfloat16)
    base, x = copy.deepcopy(run.model), torch.randn(8, 3).bfloat16()
    with zoext.Trajectory(path, run.optimizer, frames=True):
        for _ in range(3):
            for micro in x.split(2):
                run.optimizer.estimate(lambda micro=micro: run.model(micro).float().square().mean())
            run.optimizer.step()
    assert steps_in(path) == [1, 2, 3]
    assert_replays(base, path, run)


@pytest.mark.parametrize("recipe", ["agzo", "adam over agzo", "mezo", "lozo", "adamezo"])
def test_graphed_steps(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoext.graphs.graphed_step.CudaGraph", RecordedGraph)
    files: list[bytes] = []
    for graphed in (True, False):
        run = Run(recipe, graphed=graphed, dtype=torch.bfloat16, precision="residual")
        base, path = copy.deepcopy(run.model), tmp_path / f"{graphed}.jsonl"
        replays = RecordedGraph.replays
        with zoext.Trajectory(path, run.optimizer, frames=True):
            run.steps(range(9))
        assert (RecordedGraph.replays > replays) == graphed
        zoext.replay(base, path)
        assert same(dict(base.named_parameters()), dict(run.model.named_parameters()))
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_a_trajectory_that_begins_after_a_graph_was_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoext.graphs.graphed_step.CudaGraph", RecordedGraph)
    run = Run("agzo")
    run.steps(range(6))
    base, replays = copy.deepcopy(run.model), RecordedGraph.replays
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer, frames=True):
        run.steps(range(6, 10))
    assert RecordedGraph.replays == replays + 4
    zoext.replay(base, tmp_path / "run.jsonl")
    assert same(dict(base.named_parameters()), dict(run.model.named_parameters()))


def test_no_pickle_and_no_text_but_ascii(tmp_path: Path) -> None:
    run = FaultyRun("mezo")
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer, notes={"ünïcode": "☃\u2028"}):
        run.step()
    text = (tmp_path / "run.jsonl").read_bytes()
    assert text.isascii()
    assert json.loads(text.splitlines()[0])["notes"] == {"ünïcode": "☃\u2028"}


@pytest.mark.parametrize("change", ["dtype", "seed"])
def test_changes_that_the_file_does_not_record_are_refused(tmp_path: Path, change: str) -> None:
    run = FaultyRun("lozo")
    with zoext.Trajectory(tmp_path / "run.jsonl", run.optimizer):
        run.healthy(2)
        if change == "dtype":
            run.model.to(torch.float64)
        else:
            run.optimizer.param_groups[0]["seed"] = 1
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        with pytest.raises(RuntimeError, match="which the file does not record"):
            run.step()
        assert all(map(torch.equal, before, run.model.parameters()))
