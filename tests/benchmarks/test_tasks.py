"""The comparison on tasks: equal forwards, exact forward gradients, honest choices, runs that continue."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support import task_runs as small

# Of torch itself, where it loads its forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

METHODS = ("mezo", "adamezo", "agzo", "lozo", "mezo-gv", "mezo-greedy", "jvp", "adamw")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and small data."""
    folder = tmp_path_factory.mktemp("tasks")
    small.model(folder / "model")
    small.data(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def programs() -> Iterator[None]:
    """``benchmarks/`` is where its programs import from."""
    sys.path.insert(0, str(small.BENCHMARKS))
    state = torch.random.get_rng_state()
    yield
    sys.path.remove(str(small.BENCHMARKS))
    assert torch.equal(torch.random.get_rng_state(), state)


def bench_of(folder: Path, **changes: Any) -> Any:
    from task_runs import Bench, Protocol

    protocol = Protocol(
        model=str(folder / "model"),
        data=str(folder / "data"),
        dtype="float32",
        trainable="layers",
        max_length=32,
        batch_size=3,
        per_class=5,
        held_out=22,
        mu=1e-3,
        evaluations=2,
    )
    return Bench(replace(protocol, **changes))


def compare(folder: Path, out: Path, *options: str, data: str = "data") -> list[dict[str, Any]]:
    """Runs the program; returns the lines of its runs without their times."""
    import tasks

    given = ["--model", str(folder / "model"), "--data", str(folder / data), "--out", str(out)]
    given += ["--tasks", "sst2", "--prompts", "with", "--methods", "mezo,adamw", "--seeds", "2"]
    given += [
        "--forwards",
        "9",
        "--sweep-forwards",
        "7",
        "--sweep",
        ".5,2",
        "--lr",
        "3e-3",
        "--per-class",
        "5",
    ]
    given += ["--batch-size", "3", "--held-out", "22", "--threads", "1", "--schedules", "linear", *options]
    tasks.main(given)
    lines = (json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_a_killed_comparison_ends_with_the_same_table(folder: Path, tmp_path: Path) -> None:
    schedules = ("--schedules", "constant,linear")
    whole = compare(folder, tmp_path / "whole", *schedules, "--json", str(tmp_path / "whole.json"))
    assert [line["record"] for line in whole[:4]] == ["settings", "start", "start", "run"]
    lines = (tmp_path / "whole" / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    # A process that is killed while it writes leaves a part of a line; what it had not finished has none.
    (tmp_path / "killed" / "runs.jsonl").write_text("".join([*lines[:6], lines[6][:40]]))
    again = compare(folder, tmp_path / "killed", *schedules, "--json", str(tmp_path / "killed.json"))
    assert again == whole
    tables = [(tmp_path / name / "tables.md").read_text() for name in ("whole", "killed")]
    assert tables[0] == tables[1]
    documents = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "killed")]
    assert documents[0]["tables"] == documents[1]["tables"]
    rows = documents[0]["tables"][0]["rows"]
    assert [row["method"] for row in rows] == ["zero-shot", "mezo", "adamw"]
    assert all(len(row["losses"]) == 2 for row in rows)
    assert (tmp_path / "killed" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_more_seeds_and_methods_add_to_what_is_there(folder: Path, tmp_path: Path) -> None:
    before = compare(folder, tmp_path, "--methods", "adamw")
    after = compare(folder, tmp_path, "--methods", "adamw,lozo", "--seeds", "3")
    assert after[: len(before)] == before
    assert {line["method"] for line in after[len(before) :] if line["record"] == "run"} == {"adamw", "lozo"}
    assert after == compare(
        folder, tmp_path, "--methods", "lozo,adamw", "--schedules", "linear", "--table-only"
    )


def test_other_settings_need_another_folder(folder: Path, tmp_path: Path) -> None:
    compare(folder, tmp_path, "--table-only")
    with pytest.raises(
        SystemExit, match=r"--batch-size 2: the runs in .* have 3; give that, or another --out"
    ):
        compare(folder, tmp_path, "--batch-size", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sweep-forwards", "1"), "--sweep-forwards 1: a step of mezo takes 2; give at least as many"),
        (("--batch-size", "11"), "--batch-size 11: there are only 10 training examples"),
        (("--per-class", "46"), "--per-class 46: only 45 rows have the label 'negative'"),
        (("--held-out", "62"), "--held-out 62: each half has only 30 rows; give 60 or fewer"),
    ],
)
def test_what_cannot_be_is_refused(
    options: tuple[str, str], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        compare(folder, tmp_path, *options)


@pytest.mark.parametrize("name", METHODS)
def test_steps_count_as_the_forwards_that_they_take(name: str, folder: Path) -> None:
    from task_methods import METHODS as KNOWN

    assert set(KNOWN) == set(METHODS)
    bench = bench_of(folder)
    examples = bench.examples("sst2", True, 1)
    learner = KNOWN[name].make(bench.model, examples.objective, 1e-3, 1)
    batch = examples.objective.collate(examples.train[:3])
    passes: list[int] = []
    hook = bench.model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    costs = [learner.step(batch, 1e-4)[1] for _ in range(3)]
    hook.remove()
    beyond = {"jvp": 1, "adamw": 2}.get(name, 0)  # what a differentiating step counts beside its one pass
    assert costs == [KNOWN[name].forwards] * 3
    assert sum(costs) == len(passes) + 3 * beyond


@pytest.mark.parametrize("name", METHODS)
def test_budgets_are_spent_and_kept(name: str, folder: Path) -> None:
    from task_methods import METHODS as KNOWN
    from task_plan import FINAL, Run

    bench = bench_of(folder)
    before = {key: each.clone() for key, each in bench.model.state_dict().items()}
    found = bench.run(Run("trec", False, FINAL, name, 1e-4, "linear", 1, 17))
    assert 17 - KNOWN[name].forwards < found["spent"] <= 17
    assert [point["forwards"] for point in found["curve"]][-1] == found["spent"]
    assert len(found["curve"]) == 2
    assert found["test"]["loss"] > 0
    assert all(torch.equal(each, before[key]) for key, each in bench.model.state_dict().items())


def test_forward_gradients_are_inner_products_with_the_gradient(folder: Path) -> None:
    from task_methods import directional_derivative

    bench = bench_of(folder, trainable="layers.1|norm")
    bench.model.double()
    examples = bench.examples("trec", True, 2)
    batch = examples.objective.collate(examples.train[:5])
    generator = torch.Generator().manual_seed(7)
    parameters = {name: each for name, each in bench.model.named_parameters() if each.requires_grad}
    direction = {
        name: torch.randn(each.shape, generator=generator, dtype=torch.float64)
        for name, each in parameters.items()
    }
    loss = examples.objective.loss(bench.model, batch)
    loss.backward()
    expected = sum((each.grad * direction[name]).sum() for name, each in parameters.items())
    value, slope = directional_derivative(bench.model, examples.objective, batch, direction)
    torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=1e-7)
    assert abs(expected) > 1e-3


def test_no_choice_sees_the_test_half(folder: Path, tmp_path: Path) -> None:
    """With all labels of the test half exchanged, every run and every choice is the same."""
    import task_data

    test = {row["text"] for row in task_data.read(folder / "data", "sst2").test}
    other = {"positive": "negative", "negative": "positive"}
    exchanged = folder / "exchanged"
    exchanged.mkdir()
    for name in ("sst2_train.csv", "sst2_test.csv"):
        with (folder / "data" / name).open() as file:
            rows = [
                row | ({"label": other[row["label"]]} if row["text"] in test else {})
                for row in csv.DictReader(file)
            ]
        with (exchanged / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ("text", "label"))
            writer.writeheader()
            writer.writerows(rows)
    honest, other_lines = (
        [line for line in compare(folder, tmp_path / data, data=data) if line["record"] != "settings"]
        for data in ("data", "exchanged")
    )
    for ours, theirs in zip(honest, other_lines, strict=True):
        scores = ours.pop("test"), theirs.pop("test")
        assert ours == theirs
        if ours.get("phase") == "sweep":
            assert scores == (None, None)
        else:
            assert scores[0]["accuracy"] == pytest.approx(1 - scores[1]["accuracy"])


def test_no_seed_tests_what_another_chose_by_or_trained_on(folder: Path) -> None:
    import task_data

    rows = task_data.read(folder / "data", "trec")
    question = task_data.QUESTIONS["trec"]
    drawn = [task_data.draw(rows, question, seed, 5, 22) for seed in range(9)]
    used = [{row["text"] for each in drawn for row in part(each)} for part in (_train, _validation, _test)]
    assert not used[0] & used[1]
    assert not used[0] & used[2]
    assert not used[1] & used[2]
    assert len({str(each.train) for each in drawn}) == 9
    assert all(len(each.train) == 30 and len(each.test) == len(each.validation) == 11 for each in drawn)
    for label in question.words:
        assert all(sum(row["label"] == label for row in each.train) == 5 for each in drawn)


def _train(drawn: Any) -> Any:
    return drawn.train


def _validation(drawn: Any) -> Any:
    return drawn.validation


def _test(drawn: Any) -> Any:
    return drawn.test


def test_the_table_of_known_runs() -> None:
    import task_report
    from task_plan import FINAL, SWEEP, Plan, Run, Setting, Start

    plan = Plan(
        settings=(Setting("sst2", True),),
        centres={"mezo": 1e-5, "adamw": 1e-4, "lozo": 1e-5},
        factors=(1.0, 2.0, 4.0),
        schedules=("constant", "linear"),
        seeds=(0, 1),
        sweep_forwards=6,
        forwards=12,
    )

    def run(phase: str, method: str, lr: float, schedule: str, seed: int = 0) -> Run:
        return Run("sst2", True, phase, method, lr, schedule, seed, 12 if phase == FINAL else 6)

    def ended(loss: float, test: tuple[float, float] | None = None, diverged: bool = False) -> dict[str, Any]:
        scores = None if test is None else {"loss": test[0], "accuracy": test[1]}
        curve = [] if diverged else [{"forwards": 6, "loss": loss, "accuracy": 0.5}]
        return {"curve": curve, "test": scores, "diverged": diverged}

    done: dict[Any, dict[str, Any]] = {
        Start("sst2", True, seed): {
            "validation": {"loss": 0.5, "accuracy": 0.5},
            "test": {"loss": 0.5, "accuracy": 0.5},
        }
        for seed in (0, 1)
    }
    for schedule, losses in {"constant": (0.4, 0.3, 0.5), "linear": (0.45, 0.2, 0.25)}.items():
        for factor, loss in zip(plan.factors, losses, strict=True):
            done[run(SWEEP, "mezo", 1e-5 * factor, schedule)] = ended(loss)
            done[run(SWEEP, "adamw", 1e-4 * factor, schedule)] = ended(factor if schedule == "linear" else 9)
            done[run(SWEEP, "lozo", 1e-5 * factor, schedule)] = ended(0, diverged=True)
    assert plan.next(done) == run(FINAL, "mezo", 2e-5, "linear")
    done[run(FINAL, "mezo", 2e-5, "linear")] = ended(0.3, (0.25, 0.75))
    done[run(FINAL, "mezo", 2e-5, "linear", 1)] = ended(0.3, (0.35, 0.85))
    for lr, loss in ((5e-5, 0.5), (2.5e-5, 0.4), (1.25e-5, 0.3)):  # each time the best lr is the lowest
        beyond = plan.next(done)
        assert beyond == run(SWEEP, "adamw", pytest.approx(lr), "linear")
        done[beyond] = ended(loss)
    done[run(FINAL, "adamw", beyond.lr, "linear")] = ended(0.3, (0.125, 0.9))
    done[run(FINAL, "adamw", beyond.lr, "linear", 1)] = ended(0, diverged=True)
    for lr in (5e-6, 2.5e-6, 1.25e-6):
        diverging = plan.next(done)
        assert diverging == run(SWEEP, "lozo", pytest.approx(lr), "constant")
        done[diverging] = ended(0, diverged=True)
    assert plan.next(done) is None
    assert task_report.table(plan, done).splitlines() == [
        "### sst2, with prompt, 12 forwards",
        "",
        "|  | forwards per step | lr | schedule | accuracy, % | loss | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| zero-shot |  |  |  | 50.0 ± 0.0 | 0.500 ± 0.000 | 2 |",
        "| mezo | 2 | 2e-05 | linear | 80.0 ± 7.1 | 0.300 ± 0.071 | 2 |",
        "| adamw | 3 | 1.2e-05* | linear | 90.0 | 0.125 | 1, 1 diverged |",
        "| lozo | 2 |  |  | diverged | diverged | 0, 9 diverged |",
        "",
        "* The best learning rate is the lowest or the highest that was tried.",
    ]
