"""A model that FSDP2 shards has the batched losses of a whole one, and its shards are only read."""

from __future__ import annotations

import pytest

from support.batched_on_shards import CASES, RANKS
from support.ranks import errors_of

Results = dict[str, list[str | None]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What went wrong in each case, for each rank."""
    return errors_of("support.batched_on_shards", tmp_path_factory.mktemp("batched"), RANKS)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(case: str, results: Results) -> None:
    assert len(results[case]) == RANKS
    assert not any(results[case]), "\n".join(filter(None, results[case]))
