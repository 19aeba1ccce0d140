"""``torch.distributed.checkpoint`` continues a run to the same bits on another number of ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("safetensors", reason="the helpers of this test record trajectories with frames")

from support.ranks import errors_in, errors_of
from support.saved_on_ranks import CASES_BY_RANKS, SAVED_ON

Results = dict[int, dict[str, list[str | None]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What went wrong in each case, for each rank, by the number of ranks."""
    folder = tmp_path_factory.mktemp("saved")
    errors_of("support.saved_on_ranks", folder, SAVED_ON)
    return {ranks: errors_in(folder / str(ranks), ranks) for ranks in CASES_BY_RANKS}


@pytest.mark.parametrize(
    ("ranks", "case"), [(ranks, case) for ranks, cases in CASES_BY_RANKS.items() for case in cases]
)
def test_in_processes(ranks: int, case: str, results: Results) -> None:
    errors = results[ranks][case]
    assert len(errors) == ranks
    assert not any(errors), "\n".join(filter(None, errors))
