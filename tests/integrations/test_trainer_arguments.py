"""The optimizer and its options come from a command line, as HfArgumentParser reads it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

import zoext
from support.trainers import Ragged, optimizer_of, tiny_llama
from zoext.integrations.transformers import ZOArgumentsMixin, ZOTrainer, ZOTrainingArguments
from zoext.integrations.transformers._arguments import RECIPES


def parsed(*options: str, kind: type = ZOTrainingArguments) -> Any:
    (args,) = HfArgumentParser(kind).parse_args_into_dataclasses(
        ["--output_dir", "out", "--report_to", "none", "--use_cpu", *options]
    )
    return args


def built(args: Any) -> zoext.ZerothOrderOptimizer:
    trainer = ZOTrainer(tiny_llama(), args, train_dataset=Ragged(8))
    trainer.create_optimizer()
    return optimizer_of(trainer)


def test_every_option_reaches_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = '{"samples": 3, "precision": "residual", "nonfinite": "skip", "probe": "inplace"}'
    line = ["--zo_optimizer", "MeZO", "--zo_mu", "2e-3", "--zo_options", options]
    optimizer = built(parsed(*line, "--learning_rate", "3e-5", "--weight_decay", "0.2", "--seed", "11"))
    assert isinstance(optimizer, zoext.MeZO)
    assert isinstance(optimizer.probe, zoext.InplaceProbe)
    decayed, spared = optimizer.param_groups
    expected = {"lr": 3e-5, "mu": 2e-3, "seed": 11, "precision": "residual"}
    assert {name: decayed[name] for name in expected} == expected
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0.0)
    assert decayed["recipe"]["estimator"]["samples"] == 3
    assert all("norm" in name for name in spared["param_names"])


@pytest.mark.parametrize("name", ["MeZO", "AdaMeZO", "AGZO", "LOZO", "MeZOGV", "MeZOGreedy"])
def test_defaults_are_those_of_the_optimizer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    optimizer = built(parsed("--zo_optimizer", name))
    assert type(optimizer) is getattr(zoext, name)
    plain = getattr(zoext, name)(tiny_llama(), seed=42)
    for key in ("lr", "mu", "seed", "recipe", "weight_decay"):
        assert optimizer.param_groups[0][key] == plain.param_groups[0][key]


def test_all_recipes_can_be_named() -> None:
    assert RECIPES.keys() == {"MeZO", "AdaMeZO", "AGZO", "LOZO", "MeZOGV", "MeZOGreedy"}


def test_other_arguments_take_the_mixin(tmp_path: Path) -> None:
    @dataclass
    class Arguments(ZOArgumentsMixin, Seq2SeqTrainingArguments):
        pass

    args = parsed("--zo_optimizer", "LOZO", "--zo_options", '{"rank": 3}', kind=Arguments)
    assert args.predict_with_generate is False
    assert (args.zo_optimizer, args.zo_options, args.learning_rate) == ("LOZO", {"rank": 3}, 1e-6)
    again = Arguments(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})
    assert again.to_dict()["zo_options"] == {"rank": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zo_optimizer": "Adam"}, "zo_optimizer must be one of MeZO, .*, not 'Adam'"),
        ({"zo_options": "samples=4"}, r"zo_options must be a dict, or an object in JSON, not samples=4"),
        ({"zo_options": "[4]"}, r"zo_options must be a dict, or an object in JSON, not \[4\]"),
        (
            {"zo_options": {"sample": 4}},
            "the options of MeZO are samples, probe, nonfinite, precision, not 'sample'",
        ),
        ({"zo_options": {"lr": 1e-3}}, "zo_options: give lr as the argument learning_rate"),
        (
            {"zo_optimizer": "LOZO", "zo_options": {"estimator": zoext.Population(4)}},
            r"zo_options: give estimator as the argument optimizers=\(optimizer, None\) of the trainer",
        ),
        ({"zo_options": {"mu": 1e-3}}, "zo_options: give mu as the argument zo_mu"),
    ],
)
def test_bad_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZOTrainingArguments("out", **given)
