"""What models, hubs and packages raise ends in one line with the remedy; a traceback is there on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from support import compare_command
from support.finetune_command import Command, prepare
from zoext import TrajectoryError
from zoext.cli import main
from zoext.cli._errors import UserError
from zoext.cli._failures import of_model
from zoext.cli._problem.hub import cannot_load
from zoext.cli._runs.training import Training

HINT = "; ZOEXT_TRACEBACK=1 shows the traceback\n"


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def give_a_token_that_the_model_lacks(model: Path) -> None:
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 99
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def test_a_token_beyond_the_vocabulary(command: Command) -> None:
    give_a_token_that_the_model_lacks(command.folder / "model")
    assert main(command.arguments()) == 2
    said = command.capsys.readouterr().err
    assert said.startswith(
        "zoext: error: held-out examples at step 0: the model raised IndexError: index out of range"
    )
    assert "a smaller --max-length, or with the tokenizer of the model" in said
    assert said.endswith(HINT)
    assert said.count("\n") == 1


def test_a_traceback_on_request(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    give_a_token_that_the_model_lacks(command.folder / "model")
    monkeypatch.setenv("ZOEXT_TRACEBACK", "1")
    assert main(command.arguments()) == 2
    *trace, last = command.capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in trace
    assert any(line.startswith("IndexError: ") for line in trace)
    assert last.startswith("zoext: error: held-out examples at step 0: ")


def test_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = compare_command.prepare(tmp_path, capsys, monkeypatch)
    give_a_token_that_the_model_lacks(tmp_path / "model")
    assert "held-out examples: the model raised IndexError" in command.is_refused()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee also"),
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB; start again with --overwrite "
            "and a smaller --batch-size or --max-length",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
            "can't allocate memory; start again with --overwrite and a smaller --batch-size or --max-length",
        ),
        (
            RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
            "RuntimeError: The size of tensor a (3) must match the size of tensor b (4)",
        ),
        (KeyError("labels"), "KeyError: 'labels'"),
    ],
)
def test_a_step(command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    one_step, forward = Training._one_step, BertModel.forward

    def step(self: Training) -> Any:
        if self.step == 2:
            monkeypatch.setattr(BertModel, "forward", fail)
        return one_step(self)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Training, "_one_step", step)
    assert main(command.arguments("--steps=5")) == 2
    monkeypatch.setattr(BertModel, "forward", forward)
    said = command.capsys.readouterr().err
    assert said.startswith("zoext: error: step 3: the model raised ")
    assert said.endswith(expected + HINT)
    assert said.count("\n") == 1


def test_errors_that_are_not_the_models_pass() -> None:
    """Ours have remedies, and a collective raises if another rank has ended, which says why."""
    for error in (UserError("ours"), TrajectoryError("ours"), FloatingPointError("nan")):
        with pytest.raises(type(error)) as raised, of_model("step 1"):
            raise error
        assert raised.value is error
    collective: dict[str, Any] = {"__name__": "torch.distributed.distributed_c10d"}
    exec("def all_reduce():\n    raise RuntimeError('Connection closed by peer')", collective)
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"), of_model("step 1"):
        collective["all_reduce"]()


def test_divergence_advises_options_of_the_command(command: Command) -> None:
    assert main(command.arguments("--lr", "1e30", "--steps", "20")) == 2
    said = command.capsys.readouterr().err
    assert "nonfinite" not in said
    assert said.endswith("; try --lr 3.3e+29 (it was 1e+30), with --overwrite\n")
    assert main(command.arguments("--lr", "1e-3", "--overwrite")) == 0


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--model", "./nope", "model ./nope: no such folder; give a folder, or the name of a model on the"),
        ("--model", "~/nope/", "model ~/nope/: no such folder; give"),
        ("--model", "a/b/c", "model a/b/c: no such folder; give"),
        ("--model", "no name", "no such folder, and no name that a model on the Hugging Face hub can have"),
        (
            "--model",
            "nobody/none",
            "no such folder, and HF_HUB_OFFLINE keeps it from being downloaded; unset it",
        ),
        (
            "--model",
            "words.jsonl",
            "words.jsonl: is a file; give the folder that contains the files of the mo",
        ),
        ("--model", "empty", "empty: contains no config.json; give a folder that save_pretrained of"),
        (
            "--data",
            "./nope",
            "--data ./nope: no such folder; give a folder, or the name of a data set on the",
        ),
        (
            "--data",
            "nobody/none",
            "no such folder, and HF_HUB_OFFLINE keeps it from being downloaded; unset it",
        ),
    ],
)
def test_a_name_that_cannot_be_loaded(
    command: Command, monkeypatch: pytest.MonkeyPatch, option: str, value: str, expected: str
) -> None:
    if option == "--data":
        pytest.importorskip("datasets")
    monkeypatch.chdir(command.folder)
    (command.folder / "empty").mkdir()
    said = command.is_refused(option, value)
    assert expected in said
    assert "Repo id" not in said


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken"),
            "model x: needs tiktoken, not installed here: pip install tiktoken",
        ),
        (
            ImportError(
                "X requires the SentencePiece library.\nInstall it with `pip install sentencepiece`."
            ),
            "model x: X requires the SentencePiece library: pip install sentencepiece",
        ),
        (ValueError("odd\nsecond line"), "model x: cannot be loaded: odd"),
        (ConnectionError("refused"), "model x: no such folder, and HF_HUB_OFFLINE keeps it from being"),
    ],
)
def test_what_loading_raised(error: Exception, expected: str) -> None:
    assert str(cannot_load("model", "model", "x", error)).startswith(expected)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    outer = OSError("We couldn't connect")
    outer.__cause__ = ConnectionError("refused")
    assert str(cannot_load("data set", "--data", "a/b", outer)) == (
        "--data a/b: no such folder, and the Hugging Face hub cannot be reached; connect, or give a folder"
    )


def test_a_package_that_is_missing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'tiktoken.core'", name="tiktoken.core")

    monkeypatch.setattr("zoext.cli._commands.finetune.load", load)
    assert "needs tiktoken, not installed here: pip install tiktoken" in command.is_refused()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_bench_on_a_device_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert "--device cuda: " in said
    assert said.endswith("; give --device cpu\n")
