"""``zoext replay`` recomputes the model of a run from its base and its trajectory, bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import zoext
from support.finetune_command import Command, files_of_at_most, prepare
from support.graphed_runs import same
from support.tiny_models import OTHER, labelled, tiny_bert
from zoext import _C
from zoext.cli import main
from zoext.cli._commands import replay as replay_command
from zoext.cli._problem import demo, models
from zoext.cli._problem.optimizers import OPTIMIZERS
from zoext.trajectory._format import lines

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def replay(command: Command, *more: str, base: str = "", trajectory: str = "run/trajectory.jsonl") -> int:
    """Replays the run into ``replayed``; paths are relative to the folder of the test."""
    folder = command.folder
    out = () if any(option.startswith("--out") for option in more) else ("--out", str(folder / "replayed"))
    inputs = [base or str(folder / "model"), *(str(folder / name) for name in trajectory.split())]
    return main(["replay", *inputs, *out, "--quiet", *more])


def refused(command: Command, *more: str, **inputs: str) -> str:
    """The error of a replay, one line; checks that no file has changed."""
    before = command.snapshot()
    command.capsys.readouterr()
    assert replay(command, *more, **inputs) == 2
    said = command.capsys.readouterr()
    assert said.err.startswith("zoext: error: ")
    assert said.err.count("\n") == 1
    assert command.snapshot() == before
    return said.err


def assert_same_files(command: Command) -> None:
    """The replay has the files of the run's model, byte for byte, and its note."""
    replayed, model = (
        {path.name: path.read_bytes() for path in (command.folder / name).iterdir()}
        for name in ("replayed", "run/model")
    )
    del replayed["replay.json"]
    assert replayed.keys() == model.keys()
    for name in model:
        assert replayed[name] == model[name], name


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(command: Command, name: str, dtype: str) -> None:
    precision = {"float32": "stochastic", "bfloat16": "residual", "float16": "nearest"}[dtype]
    options = ["--optimizer", name, "--dtype", dtype, "--precision", precision, "--weight-decay=0.1"]
    command.works(*options, "--steps=4", "--lr=1e-3", "--record-frames")
    assert replay(command) == 0
    assert weights(command.folder / "replayed") == weights(command.out / "model")
    assert weights(command.folder / "model") != weights(command.out / "model")


@pytest.mark.parametrize("threads", [1, 3])
def test_elsewhere(
    command: Command, set_threads: Callable[[int], None], instruction_set: str, threads: int
) -> None:
    set_threads(2)
    _C.use_instruction_set("scalar")
    command.works("--optimizer=adamezo", "--dtype=bfloat16", "--lr=1e-2", "--steps=5")
    set_threads(threads)
    _C.use_instruction_set(instruction_set)
    assert replay(command) == 0
    assert weights(command.folder / "replayed") == weights(command.out / "model")


def test_a_model_that_transformers_loads(command: Command) -> None:
    """It has the classes and the tokenizer of the run's; the base has another head."""
    command.works("--task=classification", "--seed=7")
    assert replay(command) == 0
    model = BertForSequenceClassification.from_pretrained(command.folder / "replayed")
    assert model.config.id2label == {0: "0", 1: "1"}
    assert_same_files(command)


@pytest.mark.parametrize("seed", [3, 2**64 - 1, -(2**63)])
def test_a_new_head_is_drawn_as_by_the_run(command: Command, seed: int) -> None:
    words = ("kind", "cruel", "sour")
    rows = [{"text": f"{other} {word}", "label": word} for word in words for other in OTHER]
    (command.folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command.works(f"--seed={seed}")
    assert replay(command) == 0
    assert weights(command.folder / "replayed") == weights(command.out / "model")
    assert load_file(command.folder / "replayed" / "model.safetensors")["classifier.weight"].shape == (3, 16)


def test_to_a_step(command: Command) -> None:
    command.works("--steps=3", "--lr=1e-2")
    before = weights(command.out / "model")
    command.works("--steps=6", "--resume")
    assert replay(command, "--to-step=3") == 0
    assert weights(command.folder / "replayed") == before
    assert (
        json.loads((command.folder / "replayed" / "replay.json").read_text())["trajectories"][0]["step"] == 3
    )
    assert replay(command, "--to-step=0", "--overwrite") == 0
    base, found = (load_file(command.folder / at / "model.safetensors") for at in ("model", "replayed"))
    assert all(same(found[name], base[name]) for name in base)


@pytest.mark.parametrize("to_step", [None, 2])
def test_a_run_that_goes_on(command: Command, monkeypatch: pytest.MonkeyPatch, to_step: int | None) -> None:
    """The replay and its note cover exactly the steps that existed when the command began."""
    command.works("--steps=3", "--lr=1e-2")
    tuned = weights(command.out / "model")
    short = (command.out / "trajectory.jsonl").read_bytes()
    command.works("--steps=6", "--resume")
    path, other = command.folder / "live.jsonl", command.folder / "other.jsonl"
    whole = (command.out / "trajectory.jsonl").read_bytes()
    loads = replay_command._load

    def load(*arguments: Any) -> Any:
        path.write_bytes(whole)
        return loads(*arguments)

    monkeypatch.setattr(replay_command, "_load", load)
    for name, inputs in (("replayed", "live.jsonl"), ("both", "live.jsonl other.jsonl")):
        if to_step is not None and " " in inputs:
            continue
        path.write_bytes(short)
        other.write_bytes(short)
        options = [f"--to-step={to_step}"] if to_step is not None else []
        assert replay(command, *options, f"--out={command.folder / name}", trajectory=inputs) == 0
        note = json.loads((command.folder / name / "replay.json").read_text())
        lines_read = b"".join(short.splitlines(keepends=True)[: 1 + (to_step or 3)])
        for part in note["trajectories"]:
            assert part["step"] == (to_step or 3)
            assert part["sha256"] == hashlib.sha256(lines_read).hexdigest()
    if to_step is None:
        assert weights(command.folder / "replayed") == tuned


def test_the_sum_of_two(command: Command) -> None:
    """In float32 the sum of two runs equals applying one after the other, to rounding."""
    command.works("--steps=3", "--lr=1e-2")
    other = command.folder / "other"
    command.works("--steps=4", "--lr=1e-2", "--seed=0", "--optimizer=lozo", f"--out={other}")
    assert replay(command, trajectory="run/trajectory.jsonl other/trajectory.jsonl") == 0
    base = load_file(command.folder / "model" / "model.safetensors")
    runs = [load_file(out / "model" / "model.safetensors") for out in (command.out, other)]
    found = load_file(command.folder / "replayed" / "model.safetensors")
    for name, tensor in base.items():
        expected = sum((run[name] - tensor for run in runs), tensor)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    note = json.loads((command.folder / "replayed" / "replay.json").read_text())
    assert [part["step"] for part in note["trajectories"]] == [3, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_difference(command: Command, dtype: str) -> None:
    command.works(f"--dtype={dtype}", "--lr=1e-1", "--trainable=encoder", "--steps=5")
    assert replay(command, "--difference") == 0
    files = {path.name for path in (command.folder / "replayed").iterdir()}
    assert files == {"difference.safetensors", "replay.json"}
    difference = load_file(command.folder / "replayed" / "difference.safetensors")
    kind = getattr(torch, dtype)
    base = {
        name: tensor.to(kind)
        for name, tensor in load_file(command.folder / "model" / "model.safetensors").items()
    }
    tuned = load_file(command.out / "model" / "model.safetensors")
    assert difference.keys() == {name for name in base if not base[name].equal(tuned[name])}
    assert all("encoder" in name for name in difference)
    rounded = 0
    for name, change in difference.items():
        wanted = tuned[name].double() - base[name].double()
        assert change.dtype == torch.float32
        assert change.equal(wanted.float())
        rounded += int((change.double() != wanted).sum())
        if dtype != "float32":
            assert same((base[name].float() + change).to(kind), tuned[name])
    note = json.loads((command.folder / "replayed" / "replay.json").read_text())
    assert note["difference"]["rounded"] == rounded
    assert note["difference"]["elements"] == sum(change.numel() for change in difference.values())
    assert (rounded == 0) == (dtype != "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_recorded_in_python(command: Command, dtype: torch.dtype) -> None:
    model = BertForSequenceClassification.from_pretrained(command.folder / "model", dtype=dtype).eval()
    tokens = torch.tensor([[2, 3, 4], [5, 6, 7]])
    optimizer = zoext.LOZO(model, lr=1e-2)
    with zoext.Trajectory(command.folder / "mine.jsonl", optimizer, notes={"of": "mine"}):
        for _ in range(3):
            optimizer.step(lambda: model(input_ids=tokens).logits.float().square().mean())
    assert replay(command, trajectory="mine.jsonl") == 0
    found = load_file(command.folder / "replayed" / "model.safetensors")
    assert all(same(found[name], tensor) for name, tensor in model.state_dict().items())


def test_an_agzo_run_without_its_bases(command: Command) -> None:
    assert main([*command.arguments("--optimizer=agzo"), "--steps=2"]) == 0
    assert "trajectory cannot be replayed" not in command.capsys.readouterr().out  # quiet
    assert "--record-frames" in refused(command)
    arguments = [part for part in command.arguments("--optimizer=agzo", "--overwrite") if part != "--quiet"]
    assert main(arguments) == 0
    said = command.capsys.readouterr()
    assert said.out.count("the trajectory cannot be replayed") == 1
    assert "--record-frames" in said.out
    assert "Warning" not in said.err
    error = command.is_refused("--optimizer=agzo", "--checkpoint=trajectory", f"--out={command.folder / 'b'}")
    assert "--checkpoint trajectory" in error
    assert "--record-frames" in error


def test_probes_in_place_are_said_to_be_inexact(command: Command) -> None:
    arguments = [part for part in command.arguments("--probe=inplace") if part != "--quiet"]
    assert main(arguments) == 0
    said = command.capsys.readouterr()
    assert said.out.count("the trajectory cannot be replayed") == 1
    assert "Warning" not in said.err
    error = command.is_refused("--probe=inplace", "--checkpoint=trajectory", f"--out={command.folder / 'b'}")
    assert "--probe streamed" in error


def test_frames_that_are_missing(command: Command) -> None:
    command.works("--optimizer=agzo", "--record-frames")
    (command.out / "trajectory.frames").unlink()
    assert f"{command.out / 'trajectory.frames'}: is missing" in refused(command)


def test_another_base(command: Command) -> None:
    command.works()
    tiny_bert(command.folder / "wide", hidden=24)
    tiny_bert(command.folder / "other", seed=4)
    assert "model mismatch" in refused(command, base=str(command.folder / "wide"))
    assert "weights mismatch" in refused(command, base=str(command.folder / "other"))
    assert "model ./none: no such folder" in refused(command, base="./none")
    error = refused(command, base="demo")
    assert f"BASE demo: {command.out / 'trajectory.jsonl'} was recorded from another model" in error


@pytest.mark.parametrize(
    ("to_step", "expected"),
    [("4", "--to-step must be at most 3"), ("-1", "must be an integer of at least 0"), ("x", "an integer")],
)
def test_steps_that_there_are_not(command: Command, to_step: str, expected: str) -> None:
    command.works("--steps=3")
    assert expected in refused(command, f"--to-step={to_step}")


def test_paths_are_named_as_they_are(command: Command) -> None:
    """Also paths that contain words which the command replaces in errors of the library."""
    command.works("--steps=3", "--optimizer=agzo")
    folder = command.folder / "to_step=2_frames=True_to_step"
    command.out.rename(folder)
    path = f"{folder.name}/trajectory.jsonl"
    assert f"--to-step must be at most 3, the last step of {folder / 'trajectory.jsonl'}, not 4" in refused(
        command, "--to-step=4", trajectory=path
    )
    error = refused(command, trajectory=path)
    assert f"{folder / 'trajectory.jsonl'}: was recorded without" in error
    assert error.endswith("record the run with --record-frames\n")
    file = folder / "trajectory.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"step":3', b'"step":9'))
    error = refused(command, trajectory=path)
    assert f"{file}: line 4 " in error
    assert error.endswith("; replay the steps before it with --to-step 2 or fewer\n")


def test_several_up_to_a_step(command: Command) -> None:
    command.works()
    error = refused(command, "--to-step=1", trajectory="run/trajectory.jsonl run/trajectory.jsonl")
    assert "--to-step: several" in error


def test_a_corrupted_trajectory(command: Command) -> None:
    command.works("--steps=4")
    path = command.out / "trajectory.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"step":3', b'"step":9'))
    error = refused(command)
    assert f"{path}: line 4 " in error
    assert "--to-step 2 or fewer" in error
    assert replay(command, "--to-step=2") == 0
    path.write_bytes(b"")
    assert f"{path}: has no header" in refused(command, f"--out={command.folder / 'x'}")
    path.unlink()
    assert f"{path}: No such file" in refused(command, f"--out={command.folder / 'x'}")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("task", "poetry", "task must be one of"),
        ("dtype", "int8", "dtype must be one of"),
        ("dtype", 3, "dtype must be a string"),
        ("classes", ["0", 1], "classes must be a list of names"),
        ("classes", {}, "classes must be a list"),
        ("seed", 2**64, "seed must be an integer"),
        ("seed", "1", "seed must be an integer"),
        ("demo", 1, "demo must be true or false"),
        ("demo", True, "give demo"),
        ("classes", ["0", "0"], "classes must be distinct names"),
        ("classes", ["0", "1", "2"], "classes has 3 names, but no parameter of the run has as many rows"),
        ("classes", [], "classes has 0 names"),
        ("classes", [str(i) for i in range(16)], "model mismatch"),
        ("dtype", "bfloat16", "model mismatch"),
    ],
)
def test_notes_that_no_run_wrote(
    command: Command, monkeypatch: pytest.MonkeyPatch, field: str, value: object, expected: str
) -> None:
    command.works()
    path = command.out / "trajectory.jsonl"
    header = json.loads(path.read_text().splitlines()[0])
    del header["crc32"]
    header["notes"]["zoext finetune"][field] = value
    path.write_bytes(lines.encode(header, 0)[0])
    if "model mismatch" not in expected:
        monkeypatch.delattr(models, "load")  # loading could exhaust memory
    assert expected in refused(command)


def test_what_is_in_the_folder_stays(command: Command) -> None:
    command.works()
    out = command.folder / "replayed"
    assert replay(command) == 0
    assert "contains a replay; give --overwrite" in refused(command)
    (out / "mine.txt").write_text("mine")
    assert "contains mine.txt, which no replay wrote" in refused(command, "--overwrite")
    (out / "mine.txt").unlink()
    assert replay(command, "--difference", "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {"difference.safetensors", "replay.json"}
    assert not list(command.folder.glob(".*"))
    assert "is a file" in refused(command, "--out", str(command.folder / "words.jsonl"))
    assert "which no replay wrote" in refused(command, "--out", str(command.folder / "model"), "--overwrite")
    assert "which no replay wrote" in refused(command, "--out", str(command.folder), "--overwrite")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_what_comes_into_the_folder_meanwhile_stays(
    command: Command, monkeypatch: pytest.MonkeyPatch, overwrite: list[str]
) -> None:
    command.works()
    mine = command.folder / "replayed" / "mine.txt"
    if overwrite:
        assert replay(command) == 0
    loads = replay_command._load

    def load(*arguments: Any) -> Any:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        return loads(*arguments)

    monkeypatch.setattr(replay_command, "_load", load)
    assert replay(command, *overwrite) == 2
    assert "contains mine.txt, which no replay wrote" in command.capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert mine.with_name("replay.json").exists() == bool(overwrite)
    assert not list(command.folder.glob(".*"))


def test_a_replay_that_a_killed_process_moved_aside_stays(command: Command) -> None:
    command.works()
    assert replay(command, "--to-step=1") == 0
    note = (command.folder / "replayed" / "replay.json").read_bytes()
    aside = command.folder / ".replayed.old.tmp"
    (command.folder / "replayed").rename(aside)
    assert "contains a replay; give --overwrite" in refused(command)
    (aside / "mine.txt").write_text("mine")
    assert "contains mine.txt" in refused(command, "--overwrite")
    (aside / "mine.txt").unlink()
    assert replay(command, "--overwrite") == 0
    assert (command.folder / "replayed" / "replay.json").read_bytes() != note
    assert not list(command.folder.glob(".*"))


def test_a_replay_that_is_a_base_stays(command: Command) -> None:
    command.works()
    assert replay(command, "--to-step=0") == 0
    error = refused(command, "--overwrite", base=str(command.folder / "replayed"))
    assert "the replay would replace" in error


def test_progress_is_on_stderr(command: Command) -> None:
    command.works()
    arguments = [str(command.folder / "model"), str(command.out / "trajectory.jsonl")]
    assert main(["replay", *arguments, "--out", str(command.folder / "replayed")]) == 0
    said = command.capsys.readouterr()
    assert said.out == ""
    assert "replaying 2 steps" in said.err
    assert "Warning" not in said.err


def test_a_language_model(command: Command) -> None:
    """A causal model whose base files contain all weights."""
    from transformers import BertLMHeadModel

    model = BertLMHeadModel.from_pretrained(command.folder / "model", is_decoder=True)
    model.save_pretrained(command.folder / "model")
    labelled(command.folder / "words.jsonl")
    command.works("--task=causal-lm")
    assert replay(command) == 0
    assert_same_files(command)
    assert weights(command.folder / "model") != weights(command.out / "model")


@pytest.mark.parametrize("size", [100, 10_000])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk(command: Command, size: int, there: bool) -> None:
    command.works("--lr=1e-2")
    options = []
    if there:
        assert replay(command, "--to-step=1") == 0
        options = ["--overwrite"]
    with files_of_at_most(size):
        error = refused(command, *options)
    assert error.startswith(f"zoext: error: {command.folder / 'replayed'}: ")
    assert "too large" in error.lower()
    assert not list(command.folder.glob(".*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo(command: Command, set_threads: Callable[[int], None], dtype: str) -> None:
    """Its computed head has the same bits with any number of threads."""
    set_threads(1)
    problem = demo.load(dataclasses.replace(demo.SETTINGS, dtype=dtype))
    optimizer = zoext.MeZO(problem.model, lr=1e-3)
    tokens = torch.tensor([problem.train[0].tokens])
    with zoext.Trajectory(command.folder / "demo.jsonl", optimizer, notes=problem.base.notes()):
        for _ in range(2):
            optimizer.step(lambda: problem.model(input_ids=tokens).logits.float().square().mean())
    set_threads(2)
    assert replay(command, base="demo", trajectory="demo.jsonl") == 0
    found = load_file(command.folder / "replayed" / "model.safetensors")
    assert all(same(found[name], tensor) for name, tensor in problem.model.state_dict().items())
    error = refused(command, f"--out={command.folder / 'x'}", trajectory="demo.jsonl")
    assert "was recorded from another model; give demo" in error


def test_notes_that_are_not_of_the_demo(command: Command) -> None:
    """They would set the size of the head, which has two rows."""
    module = torch.nn.Linear(2, 3)
    notes = dataclasses.replace(demo.base("float32", 0), classes=("a", "b", "c")).notes()
    zoext.Trajectory(command.folder / "mine.jsonl", zoext.MeZO(module), notes=notes).close()
    error = refused(command, base="demo", trajectory="mine.jsonl")
    assert "task and classes must be those of the demo" in error


def test_the_folder_of_a_run(command: Command) -> None:
    """In place of the trajectory in it, with any number of threads."""
    command.works("--steps=3")
    model, out = command.folder / "model", command.folder / "again"
    assert main(["replay", str(model), str(command.out), "--out", str(out), "--threads=2", "--quiet"]) == 0
    weights = [folder / "model.safetensors" for folder in (command.out / "model", out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    note = json.loads((out / "replay.json").read_text(encoding="utf-8"))
    assert note["trajectories"][0]["path"] == str(command.out / "trajectory.jsonl")


def test_a_folder_without_a_trajectory(command: Command) -> None:
    model, out = str(command.folder / "model"), str(command.folder / "again")
    assert main(["replay", model, model, "--out", out]) == 2
    assert command.capsys.readouterr().err == (
        f"zoext: error: {model}: contains no trajectory.jsonl; give the folder of a run, or a trajectory\n"
    )
