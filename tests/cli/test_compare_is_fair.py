"""All runs of a comparison begin with the same weights, see the same batches and stop at the same number
of forward passes; every method is swept over equally many learning rates, MeZO up to 4 times its default."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from support.compare_command import ALL, CompareCommand, prepare, register_rivals
from zoext.cli._comparison.settings import DEMO, ComparisonSettings
from zoext.cli._comparison.start import halves
from zoext.cli._errors import UserError
from zoext.cli._problem import steps
from zoext.cli._runs import tensors
from zoext.tasks import Example, Row

STEP_FORWARDS = {"mezo": 2, "one-sided": 3, "signs": 4}


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CompareCommand:
    return prepare(tmp_path, capsys, monkeypatch)


class Watch:
    """Watches every step: the weights before it, its batch, and the number of forward passes of the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards: dict[tuple[Any, ...], int] = defaultdict(int)
        self.first_weights: dict[tuple[Any, ...], str] = {}
        self.batches: dict[tuple[Any, ...], list[list[int]]] = defaultdict(list)
        self._take = steps.take
        monkeypatch.setattr(steps, "take", self.take)

    def take(
        self, problem: Any, optimizer: Any, settings: Any, number: int, device: Any, ranks: Any
    ) -> Tensor:
        run = (settings.optimizer, settings.lr, settings.seed)
        if number == 0:
            self.first_weights[run] = tensors.digest(problem.model)
        (batch,) = steps.batches(problem, settings, number, device)
        self.batches[run].append(batch["input_ids"].flatten().tolist())

        def count(*_: object) -> None:
            self.forwards[run] += 1

        handle = problem.model.register_forward_pre_hook(count)
        try:
            return self._take(problem, optimizer, settings, number, device, ranks)
        finally:
            handle.remove()


def test_runs_stop_at_the_last_step_that_the_budget_allows(
    command: CompareCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    command.works("--optimizers", ",".join(ALL), "--lr-factors", "1,2", "--forwards", "13", "--seeds", "1")
    ends = command.of_kind("end")
    assert {end["method"] for end in ends} == set(ALL)
    for end in ends:
        each = STEP_FORWARDS[end["method"]]
        assert end["budget"] == 13
        assert end["forwards"] == 13 // each * each
        assert end["step"] == 13 // each
        assert watch.forwards[end["method"], end["lr"], end["seed"]] == end["forwards"]
    costs = {record["method"]: record["forwards_a_step"] for record in command.of_kind("method")}
    assert costs == STEP_FORWARDS


def test_runs_begin_alike_and_see_the_same_batches(
    command: CompareCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    command.works("--optimizers", ",".join(ALL), "--lr-factors", "1,2")
    runs = [(end["method"], end["lr"], end["seed"]) for end in command.of_kind("end")]
    assert len(runs) >= 3 * 3
    assert len({watch.first_weights[run] for run in runs}) == 1
    for seed in (0, 1):
        seen = [watch.batches[run] for run in runs if run[2] == seed]
        longest = max(seen, key=len)
        assert len(longest) == 6
        assert all(batches == longest[: len(batches)] for batches in seen)
    mezo = {seed: watch.batches[run] for run in runs if run[0] == "mezo" for seed in [run[2]]}
    assert mezo[0] != mezo[1]
    starts = [record for record in command.of_kind("evaluation") if record["step"] == 0]
    assert len(starts) == len(runs)
    for name in ("selection_loss", "report_loss", "report_accuracy"):
        assert len({record[name] for record in starts}) == 1


def test_evaluations_are_as_far_apart_as_asked(command: CompareCommand) -> None:
    command.works("--optimizers", "mezo,one-sided", "--lr-factors", "1", "--seeds", "1")
    at: dict[str, list[int]] = defaultdict(list)
    for record in command.of_kind("evaluation"):
        at[record["method"]].append(record["forwards"])
    assert at == {"mezo": [0, 6, 10, 12], "one-sided": [0, 6, 12]}


@pytest.mark.parametrize("settings", [ComparisonSettings(), DEMO])
def test_grids_are_of_equal_size_and_that_of_mezo_reaches_4_times(
    settings: ComparisonSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_rivals(monkeypatch)
    assert settings.grid("mezo")[-1] == pytest.approx(4 * settings.lr)
    assert settings.default_lr("mezo") == settings.lr
    assert settings.default_lr("one-sided") == 0.5 * settings.lr
    grids = [settings.grid(method) for method in ALL]
    assert len({len(grid) for grid in grids}) == 1
    for grid in grids:
        ratios = [after / before for before, after in pairwise(grid)]
        assert ratios == pytest.approx([2.0] * len(ratios))


def test_mezo_really_runs_at_4_times_its_default_lr(command: CompareCommand) -> None:
    command.works("--forwards", "2", "--seeds", "1")
    assert {0.003 * factor for factor in (0.25, 0.5, 1, 2, 4)} <= {
        end["lr"] for end in command.of_kind("end")
    }


def test_centres_of_grids_by_name(command: CompareCommand) -> None:
    command.works(
        *("--optimizers", "mezo,signs", "--lrs", "signs=0.02", "--lr-factors", "1", "--forwards", "4")
    )
    lrs = {end["method"]: end["lr"] for end in command.of_kind("end")}
    assert lrs == {"mezo": 0.003, "signs": 0.02}


def test_one_half_of_what_is_held_out_chooses_and_the_other_is_reported() -> None:
    examples = [Example((Row((i % 11, 5)),), i % 2) for i in range(40)]
    selection, report = halves(examples)
    assert sorted(map(repr, selection + report)) == sorted(map(repr, examples))
    texts = [{example.tokens for example in half} for half in (selection, report)]
    assert texts[0].isdisjoint(texts[1])
    assert [len(half) for half in texts] == [5, 6]
    assert halves(examples[::-1])[0] == selection[::-1]


def test_too_few_held_out_examples_for_two_halves() -> None:
    with pytest.raises(UserError, match=r"only 3 distinct held-out texts.*--valid-data"):
        halves([Example((Row((i % 3, 1)),), 0) for i in range(9)])
