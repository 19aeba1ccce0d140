"""Over ranks with batches of their own, AGZO's subspaces are those of all activations, with the same bits."""

from __future__ import annotations

import pytest

from support.ranks import errors_of
from support.shared_basis_runs import CASES, RANKS

Results = dict[str, list[str | None]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What went wrong in each case, for each rank."""
    return errors_of("support.shared_basis_runs", tmp_path_factory.mktemp("bases"), RANKS)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(case: str, results: Results) -> None:
    assert len(results[case]) == RANKS
    assert not any(results[case]), "\n".join(filter(None, results[case]))
