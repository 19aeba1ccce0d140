"""Ranks with batches of their own take the step of all batches together, and stay bit-identical."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import zoext
from support.ranks import errors_of
from support.replicated_runs import CASES, RANKS

Results = dict[str, list[str | None]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What went wrong in each case, for each rank."""
    return errors_of("support.replicated_runs", tmp_path_factory.mktemp("replicas"), RANKS)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(case: str, results: Results) -> None:
    assert len(results[case]) == RANKS
    assert not any(results[case]), "\n".join(filter(None, results[case]))


@pytest.mark.parametrize("group", ["world", 0, object()])
def test_groups_of_another_kind_are_refused(group: object) -> None:
    with pytest.raises(TypeError, match="process_group must be 'auto', None, a ProcessGroup or a DeviceMesh"):
        zoext.MeZO(nn.Linear(3, 2), process_group=group)  # type: ignore[arg-type]


def test_parameters_that_deepspeed_partitions_are_refused() -> None:
    """ZeRO-3 leaves an empty tensor in the place of a weight; it marks it as here."""
    model = nn.Linear(3, 2)
    model.weight.ds_id = 0  # type: ignore[assignment]
    model.weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"params: weight is partitioned by DeepSpeed.*one whole replica"):
        zoext.MeZO(model)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pending_estimates_are_reduced(reduction: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = zoext.MeZO(model, lr=0.1, reduction=reduction)
    scales = (1.0, 3.0, -2.0)
    estimates = [
        optimizer.estimate(lambda scale=scale: model(torch.ones(4, 3)).square().mean() * scale)
        for scale in scales
    ]
    loss = optimizer.step()
    divisor = len(scales) if reduction == "mean" else 1
    applied = optimizer.last_estimate
    assert applied is not None
    expected = sum(estimate.coefficients for estimate in estimates) / divisor
    torch.testing.assert_close(applied.coefficients, expected)
    torch.testing.assert_close(loss, sum(estimate.loss for estimate in estimates) / divisor)


def test_another_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', not 'max'"):
        zoext.MeZO(nn.Linear(3, 2), reduction="max")
