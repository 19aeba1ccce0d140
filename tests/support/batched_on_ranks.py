"""Runs with batched probes on several ranks: the cases of their test."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import Tensor, distributed

import zoext
from support.batched_models import PLAIN, plain
from support.dealt_runs import check_alike, flat
from support.graphed_runs import RECIPES
from support.ranks import Case, run_cases

RANKS = 2
SETTINGS = {"lr": 3e-3, "mu": 1e-2, "seed": 5, "probe": "batched"}


def evaluates_a_share_in_one_forward(recipe: str, rank: int) -> None:
    """The step of one process to rounding, since products depend on the batch; the ranks' to the bit."""
    model, losses = plain(PLAIN["mixed"])
    alone, losses_alone = plain(PLAIN["mixed"])
    calls: list[int] = []

    def closure(copies: int) -> Tensor:
        calls.append(copies)
        return losses(copies)

    dealt = RECIPES[recipe](model, process_group=None, probe_group=distributed.group.WORLD, **SETTINGS)
    single = RECIPES[recipe](alone, process_group=None, **SETTINGS)
    for step in range(3):
        torch.manual_seed(step)
        calls.clear()
        dealt.step(closure)
        torch.manual_seed(step)
        single.step(losses_alone)
        torch.testing.assert_close(
            dealt.last_estimate.coefficients, single.last_estimate.coefficients, rtol=1e-5, atol=1e-7
        )
        check_alike(model)
        alone.load_state_dict(model.state_dict())
    if recipe == "gv":  # a pool of three on two ranks, and then two probes
        assert calls == [[2, 1], [1, 1]][rank]


def averages_over_batches(recipe: str, rank: int) -> None:
    model, losses = plain(PLAIN["mixed"], train=False)
    optimizer = RECIPES[recipe](model, **SETTINGS)
    before = flat(model)
    for _ in range(3):
        optimizer.step(lambda copies: losses(copies) * (1 + rank))
        check_alike(model)
    assert not torch.equal(before, flat(model))


def tells_of_a_closure_that_is_refused(rank: int) -> None:
    """All ranks end the step, whoever raised, and may go on."""
    model, losses = plain(PLAIN["mixed"], train=False)
    optimizer = zoext.MeZO(model, samples=2, **SETTINGS)
    before = flat(model)
    expected, match = (zoext.BatchedProbeError, "see each other") if rank else (RuntimeError, "rank 1 raised")
    with pytest.raises(expected, match=match):
        optimizer.step(lambda copies: losses(copies) - losses(copies).mean() * rank)
    assert torch.equal(flat(model), before)
    optimizer.step(losses)
    check_alike(model)


CASES: dict[str, Case] = {
    **{
        f"probes, {recipe}": partial(evaluates_a_share_in_one_forward, recipe)
        for recipe in ("mezo", "lozo", "agzo", "gv", "greedy")
    },
    **{f"data, {recipe}": partial(averages_over_batches, recipe) for recipe in ("mezo", "lozo", "agzo")},
    "refused": tells_of_a_closure_that_is_refused,
}

if __name__ == "__main__":
    sys.exit(run_cases(CASES, RANKS))
