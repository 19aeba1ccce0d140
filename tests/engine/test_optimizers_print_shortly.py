"""The text of an optimizer has its axes and a line per group, whatever the size of the model."""

from __future__ import annotations

import torch
from torch import nn

import zoext


def test_every_axis_and_every_group_has_a_line() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model[0].bias.requires_grad_(False)
    groups = [
        {"params": model[0].parameters(), "lr": torch.tensor(3e-3)},
        {"params": [model[1].weight], "mu": 0.5},
    ]
    optimizer = zoext.AdaMeZO(groups, horizon=4, seed=7, weight_decay=0.25, precision="residual")
    optimizer.param_groups[1]["step"] = 123456789
    optimizer.param_groups[1]["name"] = "head"
    assert repr(optimizer).splitlines() == [
        "AdaMeZO(",
        "  direction: Gaussian()",
        "  estimator: CentralDifference(samples=1)",
        "  update: AdamReplay(betas=(0.7, 0.9), horizon=4, eps=1e-08, bias_correction=True)",
        "  probe: InplaceProbe, seed: 7, precision: residual",
        "  group 0: 2 tensors (1 frozen), 42 elements, lr 0.003, mu 0.001, weight_decay 0.25, step 0",
        "  group 1: 1 tensor, 21 elements, lr 1e-05, mu 0.5, weight_decay 0.25, step 123456789, name head",
        ")",
    ]


def test_the_names_of_parameters_are_left_out() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(200)))
    optimizer = zoext.MeZO(model)
    assert len(repr(optimizer).splitlines()) == 7
    assert "weight" not in repr(optimizer).replace("weight_decay", "")
    assert "400 tensors, 2,400 elements" in repr(optimizer)
    optimizer.step(lambda: model(torch.ones(3)).square().mean())  # with a state
    assert len(repr(optimizer).splitlines()) == 7
