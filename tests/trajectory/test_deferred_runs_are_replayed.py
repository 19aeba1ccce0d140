"""A replay of ``LowRank(defer=True)`` leaves the bits of the run; the file tells when looks merged."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.oracle import bits
from support.trajectory_files import forge, records

INTERVAL, STEPS = 5, 13
KINDS = [
    (torch.float32, "nearest"),
    (torch.float64, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "residual"),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.wide = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.wide(self.table(tokens)))))


class Run:
    """A run with its own model; ``base`` is what it began with."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, precision: str = "nearest", probe: str = "streamed"
    ):
        torch.manual_seed(5)
        self.model = Model().to(dtype)
        self.probe = probe
        self.optimizer = zoext.ZerothOrderOptimizer(
            self.model,
            lr=2e-4,
            mu=1e-2,
            seed=9,
            precision=precision,
            direction=zoext.LowRank(rank=3, refresh_interval=INTERVAL, defer=True),
            estimator=zoext.CentralDifference(samples=2),
            probe=zoext.BatchedProbe(self.model, max_copies=3) if probe == "batched" else probe,
        )

    def step(self, number: int) -> None:
        tokens = torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(number))

        def closure(copies: int = 1) -> Tensor:
            outputs = self.model(zoext.repeat({"tokens": tokens}, copies)["tokens"]).float()
            if self.probe == "batched":
                return zoext.mean_per_copy(outputs.square().mean((1, 2)), copies)
            return outputs.square().mean()

        self.optimizer.step(closure)

    def steps(self, numbers: Iterable[int], looks: Mapping[int, str] | None = None) -> None:
        """Steps with these numbers; ``looks`` happen after the step with their number."""
        for number in numbers:
            self.step(number)
            if number in (looks or {}):
                LOOKS[looks[number]](self)

    def weights(self) -> dict[str, Tensor]:
        self.optimizer.merge()
        return {name: bits(value.detach().clone()) for name, value in self.model.named_parameters()}

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        return file

    def load(self, file: io.BytesIO) -> None:
        file.seek(0)
        for part, state in zip(
            (self.model, self.optimizer), torch.load(file, weights_only=True), strict=True
        ):
            part.load_state_dict(state)


LOOKS: dict[str, Callable[[Run], object]] = {
    "merge": lambda run: run.optimizer.merge(),
    "forward": lambda run: run.model(torch.tensor([1, 4])),
    "state_dict": lambda run: run.model.state_dict(),
    "state_dict of the optimizer": lambda run: run.optimizer.state_dict(),
    "digest": lambda run: zoext.trajectory.weights_digest(run.optimizer),
    "frozen": lambda run: run.model.wide.weight.requires_grad_(False),
}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def merged(path: Path) -> list[int]:
    return [line["step"] for line in records(path)[1:] if line.get("merged")]


@pytest.mark.parametrize("probe", ["streamed", "batched"])
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_bits_with_looks_within_intervals(
    dtype: torch.dtype, precision: str, probe: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    run, fresh, silent = (Run(dtype, precision, probe) for _ in range(3))
    looks = {2: "state_dict", 3: "forward", 5: "merge", 7: "merge", 11: "state_dict of the optimizer"}
    with zoext.Trajectory(path, run.optimizer):
        run.steps(range(1, STEPS + 1), looks)
    assert merged(path) == [3, 4, 8, 12]  # the merge after step 5 is that of a new interval
    optimizer = zoext.replay(fresh.model, path)
    assert same(run.weights(), fresh.weights())
    assert optimizer.param_groups[0]["step"] == STEPS
    residuals = [
        {
            str(i): bits(state["residual"])
            for i, state in enumerate(each.state.values())
            if "residual" in state
        }
        for each in (run.optimizer, optimizer)
    ]
    assert same(*residuals)
    if dtype != torch.float64:  # otherwise the test shows nothing: looks must change bits
        silent.steps(range(1, STEPS + 1))
        assert not same(run.weights(), silent.weights())


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_is_recorded(look: str, tmp_path: Path) -> None:
    run, fresh = (Run(torch.bfloat16, "stochastic") for _ in range(2))
    path = tmp_path / "run.jsonl"
    with zoext.Trajectory(path, run.optimizer):
        run.steps(range(1, STEPS), {4: look})
    assert merged(path) == [5]
    zoext.replay(fresh.optimizer, path)
    assert same(run.weights(), fresh.weights())


def test_a_probe_of_another_optimizer_is_recorded(tmp_path: Path) -> None:
    run, fresh = (Run(torch.bfloat16, "stochastic") for _ in range(2))
    path = tmp_path / "run.jsonl"
    other = zoext.MeZO(run.model, seed=3)
    with zoext.Trajectory(path, run.optimizer):
        run.steps(range(1, 4))
        other.estimate(lambda: run.model(torch.tensor([1, 4])).float().mean())
        run.steps(range(4, 8))
    assert merged(path) == [4]
    zoext.replay(fresh.model, path)
    assert same(run.weights(), fresh.weights())


def test_a_look_between_an_estimate_and_its_step(tmp_path: Path) -> None:
    run, fresh = (Run(torch.bfloat16, "stochastic") for _ in range(2))
    path = tmp_path / "run.jsonl"
    with zoext.Trajectory(path, run.optimizer):
        run.steps(range(1, 4))
        run.optimizer.estimate(lambda: run.model(torch.tensor([1, 4])).float().square().mean())
        LOOKS["forward"](run)
        run.optimizer.step()
        run.steps(range(5, 8))
    assert merged(path) == [4]
    zoext.replay(fresh.model, path)
    assert same(run.weights(), fresh.weights())


@pytest.mark.parametrize("to_step", [1, 3, 4, 5, 7])
def test_to_every_step(to_step: int, tmp_path: Path) -> None:
    """Weights are those that a look would have seen there, whatever came later."""
    path = tmp_path / "run.jsonl"
    run, fresh, shorter = (Run(torch.bfloat16, "stochastic") for _ in range(3))
    with zoext.Trajectory(path, run.optimizer):
        run.steps(range(1, STEPS), {3: "merge", 5: "merge"})
    zoext.replay(fresh.model, path, to_step=to_step)
    shorter.steps(range(1, to_step + 1), {3: "merge"})
    assert same(fresh.weights(), shorter.weights())


@pytest.mark.parametrize(
    ("probe", "dtype", "precision"),
    [("streamed", torch.float32, "nearest"), ("batched", torch.bfloat16, "stochastic")],
)
@pytest.mark.parametrize("saved", [3, 5, 8])
def test_a_killed_run_goes_on(
    saved: int, dtype: torch.dtype, precision: str, probe: str, tmp_path: Path
) -> None:
    """From a checkpoint, in a fresh process; the file's lines after it are cut."""
    path = tmp_path / "run.jsonl"
    whole, first, second, fresh = (Run(dtype, precision, probe) for _ in range(4))
    with zoext.Trajectory(path, first.optimizer):
        first.steps(range(1, saved + 1))
        file = first.save()
        first.steps(range(saved + 1, saved + 3))
    whole.steps(range(1, STEPS + 1), {saved: "merge", 11: "forward"})
    second.load(file)
    with zoext.Trajectory(path, second.optimizer, resume=True):
        second.steps(range(saved + 1, STEPS + 1), {11: "forward"})
    assert merged(path) == [saved + 1, 12] if saved % INTERVAL else [12]
    zoext.replay(fresh.model, path)
    assert same(second.weights(), whole.weights())
    assert same(fresh.weights(), whole.weights())


def test_a_replayed_run_goes_on(tmp_path: Path) -> None:
    """A replay to the middle of an interval is a look: the continued file replays to its bits."""
    path = tmp_path / "run.jsonl"
    run, second, fresh = (Run(torch.bfloat16, "stochastic") for _ in range(3))
    with zoext.Trajectory(path, run.optimizer):
        run.steps(range(1, 9))
    zoext.replay(second.optimizer, path, to_step=7)
    with zoext.Trajectory(path, second.optimizer, resume=True):
        second.steps(range(8, STEPS))
    assert merged(path) == [8]
    zoext.replay(fresh.model, path)
    assert same(fresh.weights(), second.weights())


def test_a_recording_that_begins_within_an_interval(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run, fresh = (Run(torch.bfloat16, "stochastic") for _ in range(2))
    run.steps(range(1, 4))
    fresh.steps(range(1, 4))
    with zoext.Trajectory(path, run.optimizer):
        run.steps(range(4, 9))
    assert merged(path) == [4]  # beginning to record is a look
    zoext.replay(fresh.optimizer, path)
    assert same(fresh.weights(), run.weights())


def test_files_without_the_field_are_read(tmp_path: Path) -> None:
    """Also those whose recipe lacks the option, which means that nothing was held back."""
    path, torch_model = tmp_path / "run.jsonl", Run().model
    base = {name: value.clone() for name, value in torch_model.state_dict().items()}
    optimizer = zoext.LOZO(torch_model, lr=1e-3, refresh_interval=2, seed=1)
    with zoext.Trajectory(path, optimizer):
        for _ in range(3):
            optimizer.step(lambda: torch_model(torch.tensor([1, 4])).square().mean())
    assert "merged" not in path.read_text()
    forge(path, 1, lambda header: header["recipe"]["direction"].pop("defer"))
    assert "defer" not in json.loads(path.read_text().splitlines()[0])["recipe"]["direction"]
    fresh = Model()
    fresh.load_state_dict(base)
    zoext.replay(fresh, path)
    assert all(
        torch.equal(value, torch_model.state_dict()[name]) for name, value in fresh.state_dict().items()
    )
    forge(path, 3, lambda line: line.update(merged=True))
    fresh.load_state_dict(base)
    with pytest.raises(
        zoext.TrajectoryError, match=r"line 3: merged must be false for a direction that holds"
    ):
        zoext.replay(fresh, path)


def test_hostile_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run, fresh = Run(), Run()
    with zoext.Trajectory(path, run.optimizer):
        run.steps(range(1, 4))
    base = fresh.weights()
    for field, value, message in (
        ("merged", 1, r"line 3: merged must be true or false, not 1"),
        ("weight_decay", [0.1], r"line 3: weight_decay must be 0 for a direction that holds steps back"),
    ):
        text = path.read_bytes()
        forge(path, 3, lambda line, field=field, value=value: line.update({field: value}))
        with pytest.raises(zoext.TrajectoryError, match=message):
            zoext.replay(fresh.model, path)
        path.write_bytes(text)
    assert same(fresh.weights(), base)
    forge(path, 2, lambda line: line.update(seeds=[], coefficients=[]))  # harmless, as in other files
    zoext.replay(fresh.model, path, to_step=1)
    assert same(fresh.weights(), base)
    with pytest.raises(
        ValueError, match=r"path: the run of .* holds steps back .*; call zoext\.replay on the base"
    ):
        zoext.Follower(fresh.model, path)
