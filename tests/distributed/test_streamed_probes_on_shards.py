"""Streamed probes of a sharded model run the forwards of the unsharded one, and leave its shards alone."""

from __future__ import annotations

import pytest

from support.ranks import errors_of
from support.streamed_shards import CASES, RANKS

Results = dict[str, list[str | None]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What went wrong in each case, for each rank."""
    return errors_of("support.streamed_shards", tmp_path_factory.mktemp("streamed"), RANKS)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(case: str, results: Results) -> None:
    assert len(results[case]) == RANKS
    assert not any(results[case]), "\n".join(filter(None, results[case]))
