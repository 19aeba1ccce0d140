"""``zoext finetune`` knows every method by name, gives it its own options, and resumes it bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import zoext
from support.finetune_command import Command, prepare
from zoext.cli import main
from zoext.cli._problem import optimizers
from zoext.cli._problem.optimizers import OPTIMIZERS
from zoext.cli._settings import Settings
from zoext.directions.activation_subspace import BALANCES


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def forwards_of(out: Path) -> int:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["forwards"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_runs_and_resumes(command: Command, name: str) -> None:
    """Also for windows of moments and bases, which the checkpoint contains."""
    arguments = ["--optimizer", name, "--lr", "1e-5", "--checkpoint-every", "2"]
    command.works(*arguments, "--steps=5")
    whole = load_file(command.out / "model" / "model.safetensors")
    other = command.folder / "other"
    command.works(*arguments, "--steps=3", f"--out={other}")
    command.works(f"--out={other}", "--steps=5", "--resume")
    parts = load_file(other / "model" / "model.safetensors")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert forwards_of(command.out) == forwards_of(other)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mezo", {"samples": "3"}, {"estimator": {"name": "CentralDifference", "samples": 3}}),
        (
            "adamezo",
            {"betas": "0.5/0.25", "horizon": "7", "eps": "1e-3", "bias_correction": "false"},
            {
                "update": {
                    "name": "AdamReplay",
                    "betas": [0.5, 0.25],
                    "horizon": 7,
                    "eps": 1e-3,
                    "bias_correction": False,
                }
            },
        ),
        (
            "agzo",
            {"rank": "2", "balance": BALANCES[-1], "mask": "none"},
            {
                "direction": {
                    "name": "ActivationSubspace",
                    "rank": 2,
                    "power_iterations": 3,
                    "mask": None,
                    "balance": BALANCES[-1],
                }
            },
        ),
    ],
)
def test_options_reach_the_optimizer(name: str, options: dict[str, str], expected: dict[str, Any]) -> None:
    optimizer = optimizers.make(nn.Linear(4, 3), Settings(optimizer=name, options=options))
    recipe = optimizer.param_groups[0]["recipe"]
    assert {axis: recipe[axis] for axis in expected} == expected


def test_an_lr_that_is_not_given_is_the_optimizers_own(command: Command) -> None:
    for name, scale in (("mezo", 1.0), ("adamezo", OPTIMIZERS["adamezo"].lr_scale)):
        command.works("--optimizer", name, "--lr=0.25", "--steps=1", "--overwrite")
        assert json.loads((command.out / "run.json").read_text())["settings"]["lr"] == 0.25
        arguments = [part for part in command.arguments("--optimizer", name) if not part.startswith("--lr")]
        assert main([*arguments, "--steps=1", "--overwrite"]) == 0
        settings = json.loads((command.out / "run.json").read_text())["settings"]
        assert settings["lr"] == pytest.approx(Settings.lr * scale)


def test_options_are_kept_for_resuming(command: Command) -> None:
    command.works("--optimizer", "mezo-gv", "--options", "pool_size=6,weighting=centered", "--steps=1")
    assert forwards_of(command.out) == 8
    command.works("--steps=2", "--resume")
    assert forwards_of(command.out) == 16


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("rank", "must be NAME=VALUE,... with each name once, not rank"),
        ("rank=", "must be NAME=VALUE"),
        ("rank=1,rank=2", "each name once"),
        ("colour=red", "it has no option colour; its options: rank, power_iterations, mask, balance"),
        ("lr=3", "it has no option lr"),
        ("rank=two", "option rank must be of the form of 1, not two"),
        ("rank=0", "rank must be an integer of at least 1, not 0"),
        ("balance=equal", f"balance must be one of {', '.join(BALANCES)}, not 'equal'"),
    ],
)
def test_wrong_options(command: Command, options: str, expected: str) -> None:
    assert expected in command.is_refused("--optimizer", "agzo", "--options", options)


def test_the_registry_makes_what_the_recipes_make() -> None:
    """The methods of papers are the recipes at their defaults."""
    model = nn.Linear(4, 3)
    recipes = {
        "mezo": zoext.MeZO,
        "adamezo": zoext.AdaMeZO,
        "agzo": zoext.AGZO,
        "lozo": zoext.LOZO,
        "mezo-gv": zoext.MeZOGV,
        "mezo-greedy": zoext.MeZOGreedy,
    }
    assert {name for name, method in OPTIMIZERS.items() if not method.variant} == recipes.keys()
    for name, recipe in recipes.items():
        made = optimizers.make(copy.deepcopy(model), Settings(optimizer=name))
        assert made.param_groups[0]["recipe"] == recipe(model).param_groups[0]["recipe"]


def test_precision_is_what_is_asked_for(command: Command) -> None:
    """In 16 bits each precision gives another result; the default is stochastic."""
    ends = {}
    for option in ([], *([f"--precision={name}"] for name in ("nearest", "stochastic", "residual"))):
        command.works("--dtype=bfloat16", "--steps=4", "--lr=1e-2", "--overwrite", *option)
        ends["".join(option)] = (command.out / "model" / "model.safetensors").read_bytes()
    assert ends[""] == ends["--precision=stochastic"]
    assert len(set(ends.values())) == 3
    command.works("--resume", "--steps=5")
    assert "residual" in (command.out / "run.json").read_text()
    assert "--precision nearest: the run" in command.is_refused("--resume", "--precision=nearest")
