"""Ranks that share the probes of a round, or weigh their losses, take the step of one process."""

from __future__ import annotations

import pytest
from torch import nn

import zoext
from support.dealt_runs import CASES, RANKS
from support.ranks import errors_of

Results = dict[str, list[str | None]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What went wrong in each case, for each rank."""
    return errors_of("support.dealt_runs", tmp_path_factory.mktemp("dealt"), RANKS)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(case: str, results: Results) -> None:
    assert len(results[case]) == RANKS
    assert not any(results[case]), "\n".join(filter(None, results[case]))


@pytest.mark.parametrize("group", ["world", "auto", object()])
def test_groups_of_another_kind_are_refused(group: object) -> None:
    with pytest.raises(TypeError, match="probe_group must be None or a ProcessGroup"):
        zoext.MeZO(nn.Linear(3, 2), probe_group=group)  # type: ignore[arg-type]
