"""A run on several ranks is recorded by the first one, to the bytes of the run on one process."""

from __future__ import annotations

import pytest

pytest.importorskip("safetensors", reason="the frames of trajectories are written with it")

from support.ranks import errors_of
from support.recorded_ranks import CASES, RANKS

Results = dict[str, list[str | None]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What went wrong in each case, for each rank."""
    return errors_of("support.recorded_ranks", tmp_path_factory.mktemp("recorded"), RANKS)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(case: str, results: Results) -> None:
    assert len(results[case]) == RANKS
    assert not any(results[case]), "\n".join(filter(None, results[case]))
