"""Ranks with ``LowRank(defer=True)`` move alike, and a rank that has merged alone is found."""

from __future__ import annotations

import pytest

from support.deferring_runs import CASES, RANKS
from support.ranks import errors_of

Results = dict[str, list[str | None]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What went wrong in each case, for each rank."""
    return errors_of("support.deferring_runs", tmp_path_factory.mktemp("deferring"), RANKS)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(case: str, results: Results) -> None:
    assert len(results[case]) == RANKS
    assert not any(results[case]), "\n".join(filter(None, results[case]))
