"""``zoext visualize slice`` evaluates the loss along random directions and changes no weight."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support.finetune_command import Command, prepare
from support.graphed_runs import same
from zoext import noise
from zoext.cli import main
from zoext.cli._pictures import model_slice, slices
from zoext.cli._pictures.slices import Plan, Slice
from zoext.cli._problem import load, steps
from zoext.cli._settings import Settings

PLAN = Plan(mu=0.003, reach=0.05, points=7, directions=3, seed=11)


class Bowl(nn.Module):
    """Half the squared distance from a centre, times a factor, and a linear term of another parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
        self.matrix = nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))

    def forward(self, factor: float) -> Tensor:
        distance = (self.matrix @ self.frozen - 1).square().sum()
        return factor * distance / 2 + self.vector.sum()

    def along(self, seed: int, factor: float) -> tuple[float, float, float]:
        """The coefficients of 1, t and t^2 of the loss along the direction of ``seed``."""
        # Noise keys are positions among all parameters.
        z = noise.normal((5, 3), seed=seed, key=1, dtype=torch.float64)
        y = noise.normal(7, seed=seed, key=2, dtype=torch.float64)
        offset, change = self.matrix.detach() @ self.frozen - 1, z @ self.frozen
        return (
            self(factor).item(),
            (factor * (offset @ change) + y.sum()).item(),
            (factor * (change @ change) / 2).item(),
        )


def measured(module: nn.Module, probe: str = "auto") -> Slice:
    return slices.measure(module, [lambda: module(1.0), lambda: module(2.5)], PLAN, probe)


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_a_quadratic_model_gives_its_parabola(probe: str) -> None:
    bowl = Bowl()
    before = {name: value.clone() for name, value in bowl.state_dict().items()}
    found = measured(bowl, probe)
    assert all(same(value, before[name]) for name, value in bowl.state_dict().items())
    assert found.losses.shape == (3, 7, 2)
    for direction in range(3):
        seed = noise.step_seed(11, 0, direction)
        for batch, factor in enumerate((1.0, 2.5)):
            constant, slope, curvature = bowl.along(seed, factor)
            wanted = [constant + slope * t + curvature * t * t for t in PLAN.distances]
            assert found.losses[direction, :, batch].tolist() == pytest.approx(wanted, rel=1e-12)
            assert found.slopes[direction, :, batch].tolist() == pytest.approx([slope] * 11, rel=1e-9)


def test_distances_and_mus() -> None:
    assert PLAN.distances == pytest.approx([0.05 * k / 3 for k in range(-3, 4)], rel=1e-7)
    assert PLAN.distances[3] == 0
    assert PLAN.mus == pytest.approx([0.003 * 10 ** (k / 2) for k in range(-6, 5)], rel=1e-7)


def of_slopes(slope: list[list[float]]) -> Slice:
    """A slice with one direction and the slopes [M, B]."""
    return Slice(
        dataclasses.replace(PLAN, directions=1), torch.zeros(1, 7, 2), torch.tensor([slope]).double()
    )


def test_the_error_of_a_cubic_is_that_of_its_third_derivative() -> None:
    """A loss with the slope g and the third derivative 6 c along z has central differences g + c mu^2."""
    found = slices.accuracy(of_slopes([[2 + 5 * mu**2, -4 + 5 * mu**2] for mu in PLAN.mus]))
    assert found.reference[0].tolist() == pytest.approx([2, -4], abs=1e-6)
    assert found.errors[-4:] == pytest.approx([5 * mu**2 for mu in PLAN.mus[-4:]], rel=1e-2)
    assert found.batch_noise == pytest.approx(math.sqrt(18), rel=1e-6)
    limit = math.sqrt(0.1 * math.sqrt(18) / 5)
    assert found.good_mus(PLAN.mus) == [mu for mu in PLAN.mus if mu < limit]
    assert found.reference_error < 1e-5


def test_losses_that_are_too_coarse_are_no_reference() -> None:
    """In 16 bits a small mu changes no loss; these zeros agree with each other, but mean nothing."""
    slopes = [[0.0, 0.0]] * 4 + [[3 + 2 * mu**2, 1 + 2 * mu**2] for mu in PLAN.mus[4:]]
    found = slices.accuracy(of_slopes(slopes))
    assert found.reference[0].tolist() == pytest.approx([3, 1], abs=1e-4)
    assert found.errors[:4] == pytest.approx([math.sqrt(5)] * 4, rel=1e-4)


def test_a_loss_that_overflows_is_left_out() -> None:
    slopes = [[3.0, 1.0 + 1e-6 * m] for m in range(10)] + [[math.nan, math.inf]]
    found = slices.accuracy(of_slopes(slopes))
    assert found.reference[0].tolist() == pytest.approx([3, 1], abs=1e-4)
    assert "at mu 3e-06, 9.5e-06, 3e-05" in slices.advice(of_slopes(slopes), found)


def test_no_advice_without_losses() -> None:
    nothing = of_slopes([[math.nan, math.nan]] * 11)
    assert "not finite" in slices.advice(nothing, slices.accuracy(nothing))


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def arguments(command: Command, *more: str) -> list[str]:
    out = command.folder / "pictures"
    sizes = ("--points=3", "--directions=2", "--batches=3", "--batch-size=5", "--device=cpu")
    return ["visualize", "slice", "--out", str(out), *sizes, *more]


def of_model(command: Command) -> list[str]:
    return ["--model", str(command.folder / "model"), "--data", str(command.folder / "words.jsonl")]


def numbers(command: Command) -> dict[str, object]:
    found: dict[str, object] = json.loads((command.folder / "pictures" / "slice.json").read_text())
    return found


def test_a_model(command: Command) -> None:
    more = [*of_model(command), "--mu=0.02", "--reach=0.3", "--seed=4", "--max-length=7"]
    assert main(arguments(command, *more)) == 0
    # 2 directions, 3 distances and 2 for each of 11 mu, 3 batches
    assert "150 forward passes" in command.capsys.readouterr().out
    assert (command.folder / "pictures" / "slice.png").read_bytes()[:4] == b"\x89PNG"
    settings = Settings(
        model=str(command.folder / "model"),
        data=str(command.folder / "words.jsonl"),
        batch_size=5,
        seed=4,
        max_length=7,
    )
    problem = load(settings, torch.device("cpu"))
    with torch.no_grad():
        wanted = [
            steps.scores_of(problem, steps.batches(problem, settings, step, torch.device("cpu")))
            .mean_loss()
            .item()
            for step in range(3)
        ]
    losses = torch.tensor(numbers(command)["losses"])
    assert losses.shape == (2, 3, 3)
    for direction in range(2):
        assert losses[direction, 1].tolist() == pytest.approx(wanted, rel=1e-5)
    assert numbers(command)["distances"] == pytest.approx([-0.3, 0, 0.3])


def test_the_weights_of_a_run(command: Command) -> None:
    command.works("--steps=6", "--lr=0.05", "--seed=9", "--mu=0.004")
    settings = model_slice.settings_of({"batch_size": 5}, command.out)
    assert (settings.seed, settings.mu, settings.batch_size) == (9, 0.004, 5)
    for to_step, folder in ((None, command.out / "model"), (0, command.folder / "model")):
        problem = model_slice.load_at(settings, command.out, to_step, torch.device("cpu"))
        weights = load_file(folder / "model.safetensors")
        assert weights
        found = problem.model.state_dict()
        assert all(same(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--batches=9",), r"--batches 9: batches of 5 take 45 .* there are 36; give fewer"),
        (("--points=4",), r"--points: must be odd"),
        (("--to-step=3",), r"--to-step 3: needs --run"),
        (("--run=nowhere",), r"--model .*: --run nowhere has its own"),
        (("--mu=0",), r"--mu: must be finite and > 0"),
    ],
)
def test_refused(command: Command, more: tuple[str, ...], error: str) -> None:
    is_refused(command, *of_model(command), *more, error=error)


def test_folders_that_are_no_run(command: Command) -> None:
    is_refused(command, f"--run={command.folder}", error=r"holds no run of zoext finetune; give its --out")
    command.works()
    note = command.out / "run.json"
    note.write_text(note.read_text().replace('"seed": 0', '"seed": 1'))
    is_refused(command, f"--run={command.out}", error=r"run\.json: was edited.*; give --model and --data")


def test_a_run_that_cannot_be_replayed(command: Command) -> None:
    command.works("--optimizer=agzo")
    run = f"--run={command.out}"
    is_refused(command, run, error=r"cannot be replayed: .*; give --model .*model and --data")
    is_refused(command, run, "--to-step=77", error=r"--to-step.* 77")
    (command.out / "trajectory.jsonl").unlink()
    is_refused(command, run, error=r"has no trajectory\.jsonl")


def is_refused(command: Command, *more: str, error: str) -> None:
    before = command.snapshot()
    command.capsys.readouterr()
    assert main(arguments(command, *more)) == 2
    said = command.capsys.readouterr()
    assert said.err.count("\n") == 1
    assert re.search(error, said.err), said.err
    assert command.snapshot() == before
