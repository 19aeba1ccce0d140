"""Every command explains itself with three examples that work, and every optimizer with what a step costs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from support.tiny_models import labelled, tiny_bert
from zoext.cli import main
from zoext.cli._parser import COMMANDS, parsed
from zoext.cli._problem.optimizers import OPTIMIZERS


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"] if name else ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def examples(text: str) -> list[list[str]]:
    """The arguments of the examples at the end of a help text."""
    block = text.partition("\nexamples:\n")[2]
    return [shlex.split(line)[1:] for line in re.findall(r"^  (zoext .*)$", block, re.MULTILINE)]


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_three_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = help_of(name, capsys)
    lines = re.findall(r"^  (?:[A-Z_]+=\w+ )?zoext .*$", found.partition("\nexamples:\n")[2], re.MULTILINE)
    assert len(lines) == 3
    for arguments in examples(found):
        assert not name or arguments[0] == name
        if ">" in arguments:
            arguments = arguments[: arguments.index(">")]
        parsed(arguments, arguments[0])


def test_every_command_has_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of("", capsys).split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.help}" in text
        assert command.help[0].isupper()
        assert command.help.endswith(".")


@pytest.mark.parametrize("command", ["finetune", "compare"])
def test_every_optimizer_has_a_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    for name, method in OPTIMIZERS.items():
        assert re.search(
            rf"^  {name} +{method.forwards}  {re.escape(method.description)}$", text, re.MULTILINE
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_costs_what_the_help_says(name: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, calls = torch.linspace(-1, 1, 20).view(4, 5), 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return model(x).square().mean()

    options = {"lr": 1e-4, "mu": 1e-3, "weight_decay": 0.0, "seed": 0, "probe": "auto"}
    optimizer = OPTIMIZERS[name].make(model, **options)
    optimizer.step(closure)
    calls = 0
    optimizer.step(closure)
    assert calls == OPTIMIZERS[name].forwards


def test_the_examples_of_runs_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On models and data of these names, in a few steps; those of the demo take minutes."""
    monkeypatch.chdir(tmp_path)
    for name in ("roberta-base", "base"):
        tiny_bert(tmp_path / name)
    lines = labelled(tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    table = "".join(f"{row['text']},{row['label']}\n" for row in rows)
    (tmp_path / "reviews.csv").write_text(f"text,label\n{table}")

    _, new, resumed = examples(help_of("finetune", capsys))
    few = ["--steps", "3", "--quiet", "--device", "cpu"]
    assert main([*new, *few]) == 0
    assert main([*resumed, "--steps", "4", "--quiet"]) == 0
    for seed, name in enumerate("ab"):
        arguments = ["finetune", "--model=base", "--data=reviews.csv", f"--out=runs/{name}", f"--seed={seed}"]
        assert main([*arguments, *few, "--trainable=encoder"]) == 0
    _, earlier, both = examples(help_of("replay", capsys))
    assert main([*earlier, "--to-step", "2", "--quiet"]) == 0
    assert main([*both, "--quiet"]) == 0
    for written in ("runs/reviews/model", "runs/earlier", "runs/both/difference.safetensors"):
        assert (tmp_path / written).exists()
