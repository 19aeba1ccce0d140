"""A closure may copy, pickle and run copies of the model: the hooks of a probe are none of theirs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import zoext

X = torch.ones(4, 3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_copies_run_and_pickle_like_any_module(how: str, probe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    copies: list[nn.Module] = []
    optimizer = zoext.MeZO(model, lr=0.0, mu=1e-2, probe=probe)

    def closure() -> Tensor:
        made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        copies.append(made)
        return model(X).square().mean() + made.eval()(X).square().mean()

    for _ in range(3):
        optimizer.step(closure)
    for made in copies:
        weights = [parameter.detach().clone() for parameter in made.parameters()]
        again = pickle.loads(pickle.dumps(made))
        optimizer.step(lambda made=made: model(X).square().mean() + made(X).square().mean())
        assert all(map(torch.equal, weights, made.parameters()))
        torch.testing.assert_close(again(X), made(X))
        assert all(type(module._parameters) is dict for module in made.modules())
