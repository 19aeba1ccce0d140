"""A checkpoint with weights leads to the same final bits, whatever happened to the trajectory beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.finetune_command import Command, prepare
from zoext.cli import main
from zoext.cli._problem import demo
from zoext.cli._runs.records import read_metrics
from zoext.cli._runs.training import Training
from zoext.trajectory import OwnedFile, open_recording

COMMON = ("--steps=5", "--checkpoint-every=3", "--eval-every=4", "--lr=1e-2")
LAST = "--steps=8"
MOVED = ("corrupted", "trajectory.base")
REMEMBER = ("--optimizer=adamezo", "--precision=residual --dtype=bfloat16")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return prepare(tmp_path, capsys)


def corrupt(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "gone":
            path.unlink()
        case "flipped":
            at = content.find(b'"step":3') if path.suffix == ".jsonl" else len(content) // 2
            path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
        case "torn":
            path.write_bytes(content[:-5])
        case "empty":
            path.write_bytes(b"")
        case "no text":
            path.write_bytes(bytes(range(256)))


def resumed(command: Command, *more: str) -> str:
    """The stderr of a resumed run."""
    command.capsys.readouterr()
    assert main(command.arguments("--resume", *more)) == 0
    return command.capsys.readouterr().err


def assert_as_in_peace(command: Command, *options: str) -> None:
    """The model and the losses are those of an undisturbed run."""
    whole = command.folder / "whole"
    command.works(*COMMON, *options, LAST, f"--out={whole}")
    for path in (whole / "model").iterdir():
        assert (command.out / "model" / path.name).read_bytes() == path.read_bytes(), path.name
    assert losses_of(command.out) == losses_of(whole)


def losses_of(run: Path) -> list[tuple[int, float]]:
    records = read_metrics(run / "metrics.jsonl")
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def assert_replays(command: Command) -> None:
    """The new trajectory leads from the model beside it to the final model."""
    inputs = [str(command.out / name) for name in ("trajectory.base", "trajectory.jsonl")]
    replayed = command.folder / "replayed"
    assert main(["replay", *inputs, "--out", str(replayed), "--quiet"]) == 0
    for path in (command.out / "model").iterdir():
        assert (replayed / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("how", ["gone", "flipped", "torn", "empty", "no text"])
def test_a_new_trajectory_begins_where_the_checkpoint_is(command: Command, how: str) -> None:
    command.works(*COMMON)
    path = command.out / "trajectory.jsonl"
    corrupt(path, how)
    content = None if how == "gone" else path.read_bytes()
    said = resumed(command, LAST)
    assert said.startswith(f"zoext: warning: {path}: ")
    assert said.count("\n") == 1
    assert f"begins at step 5, with the model in {command.out / 'trajectory.base'}" in said
    if content is not None:
        assert f"it was moved to {command.out / 'corrupted' / 'trajectory-1'};" in said
        assert (command.out / "corrupted" / "trajectory-1" / "trajectory.jsonl").read_bytes() == content
    assert open_recording(path).header.step == 5
    assert_as_in_peace(command)
    assert_replays(command)


@pytest.mark.parametrize("how", ["gone", "flipped", "torn"])
def test_bases_that_are_corrupted(command: Command, how: str) -> None:
    options = ("--optimizer=agzo", "--record-frames", "--dtype=bfloat16")
    command.works(*COMMON, *options)
    names = ["trajectory.jsonl", "trajectory.frames"]
    corrupt(command.out / "trajectory.frames", how)
    before = {name: (command.out / name).read_bytes() for name in names if (command.out / name).exists()}
    assert f"zoext: warning: {command.out / 'trajectory.frames'}: " in resumed(command, LAST)
    kept = command.out / "corrupted" / "trajectory-1"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert_as_in_peace(command, *options)
    assert_replays(command)


@pytest.mark.parametrize("options", REMEMBER)
def test_an_optimizer_that_remembers_goes_on_without_one(command: Command, options: str) -> None:
    command.works(*COMMON, *options.split())
    corrupt(command.out / "trajectory.jsonl", "flipped")
    assert "continues from step 5 without a trajectory" in resumed(command, "--steps=7")
    assert "--checkpoint weights" in command.is_refused("--resume", LAST, "--checkpoint=trajectory")
    assert "continues from step 7 without a trajectory" in resumed(command, LAST)
    assert not (command.out / "trajectory.jsonl").exists()
    assert [path.name for path in (command.out / "corrupted").iterdir()] == ["trajectory-1"]
    assert_as_in_peace(command, *options.split())


def test_it_goes_on_with_the_new_one(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it was killed before the first checkpoint after it began."""
    command.works(*COMMON)
    corrupt(command.out / "trajectory.jsonl", "flipped")
    one_step = Training._one_step

    def fails(self: Training) -> object:
        if self.step == 6:
            raise MemoryError
        return one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_one_step", fails)
        patch.setattr(Training, "_save", lambda *_: None)
        with pytest.raises(MemoryError):
            main(command.arguments("--resume", LAST, "--checkpoint-every=9"))
    assert resumed(command, "--steps=7") == ""
    assert resumed(command, LAST) == ""
    assert [path.name for path in (command.out / "corrupted").iterdir()] == ["trajectory-1"]
    assert_as_in_peace(command)
    assert_replays(command)


def test_nothing_is_kept_in_place_of_an_earlier_one(command: Command) -> None:
    command.works(*COMMON)
    contents = []
    for steps in ("--steps=6", LAST):
        corrupt(command.out / "trajectory.jsonl", "flipped")
        contents.append((command.out / "trajectory.jsonl").read_bytes())
        resumed(command, steps)
    for number, content in enumerate(contents, 1):
        kept = command.out / "corrupted" / f"trajectory-{number}"
        assert (kept / "trajectory.jsonl").read_bytes() == content
        assert (kept / "trajectory.base").is_dir() == (number == 2)
    assert_as_in_peace(command)
    assert_replays(command)
    command.works(*COMMON, "--overwrite")
    assert not any((command.out / name).exists() for name in MOVED)


def test_checkpoints_that_need_the_steps_before_are_refused(command: Command) -> None:
    command.works(*COMMON)
    corrupt(command.out / "trajectory.jsonl", "flipped")
    assert "--checkpoint weights" in command.is_refused("--resume", LAST, "--checkpoint=trajectory")
    resumed(command, "--steps=7")
    error = command.is_refused("--resume", LAST, "--checkpoint=trajectory")
    assert "begins at step 5" in error
    assert "--checkpoint weights" in error


@pytest.mark.parametrize("how", ["not at all", "flipped"])
def test_one_that_another_run_is_writing_stays(command: Command, how: str) -> None:
    command.works(*COMMON)
    path = command.out / "trajectory.jsonl"
    corrupt(path, how)
    with OwnedFile(path):
        assert "another run is writing it" in command.is_refused("--resume", LAST)


@pytest.mark.parametrize("how", ["gone", "flipped", "torn", "empty"])
def test_without_weights_the_error_says_what_is_left(command: Command, how: str) -> None:
    command.works(*COMMON, "--checkpoint=trajectory")
    path = command.out / "trajectory.jsonl"
    whole = path.read_bytes()
    corrupt(path, how)
    error = command.is_refused("--resume", LAST)
    assert error.startswith(f"zoext: error: {path}: is ")
    last = {"flipped": 2, "torn": 4}.get(how)
    assert (f"zoext replay BASE {path} --to-step {last} --out DIR" in error) == (last is not None)
    newest, older = (command.out / "checkpoints" / f"step-0000000{step}" for step in (5, 3))
    if how == "torn":
        assert f"remove {newest} to resume from {older.name}" in error
        (newest / "state.json").unlink()
        newest.rmdir()
    else:
        assert "restore the file of this run" in error
        path.write_bytes(whole)
    assert resumed(command, LAST) == ""
    assert_as_in_peace(command, "--checkpoint=trajectory")


def test_without_weights_and_with_corrupted_bases(command: Command) -> None:
    command.works(*COMMON, "--optimizer=agzo", "--record-frames", "--checkpoint=trajectory")
    corrupt(command.out / "trajectory.frames", "flipped")
    error = command.is_refused("--resume", LAST)
    assert f"{command.out / 'trajectory.frames'}: corrupted at byte" in error
    assert "--to-step 2 --out DIR still recovers" in error
    assert "restore the file of this run" in error


def test_the_demo(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new trajectory begins with a model in a folder."""
    read_words = demo.read_words
    monkeypatch.setattr(demo, "read_words", lambda path: [part.take(range(4)) for part in read_words(path)])
    out = ["--out", str(command.out), "--quiet"]
    small = ["--batch-size=2", "--trainable=^classifier"]
    assert main(["finetune", "--demo=words", *out, *small, "--steps=1"]) == 0
    corrupt(command.out / "trajectory.jsonl", "flipped")
    assert main(["finetune", *out, "--resume", "--steps=2"]) == 0
    header = json.loads((command.out / "trajectory.jsonl").read_text().splitlines()[0])
    assert header["notes"]["zoext finetune"]["demo"] is False
    assert_replays(command)


@pytest.mark.parametrize("how", ["gone", "empty", "no text"])
def test_metrics_stop_no_run_either(command: Command, how: str) -> None:
    command.works(*COMMON)
    corrupt(command.out / "metrics.jsonl", how)
    told = resumed(command, LAST)
    assert f"warning: {command.out / 'metrics.jsonl'}: " in told
    assert "metrics restart at step 5" in told
    whole = command.folder / "whole"
    command.works(*COMMON, LAST, f"--out={whole}")
    assert (command.out / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()
    assert losses_of(command.out) == losses_of(whole)[5:]
    kept = command.out / "corrupted" / "metrics-1" / "metrics.jsonl"
    assert kept.exists() == (how != "gone")


@pytest.mark.parametrize(
    "line",
    [
        "[2]",
        '{"step": 2}',
        '{"loss": 1.0, "forwards": 2}',
        '{"step": "2", "forwards": 2}',
        '{"step": 2, "forwards": 4, "valid_loss": 1.0}',
        '{"step": 2, "forwards": 4, "loss": "low"}',
        "[" * 100_000,
        "9" * 5_000,
    ],
    ids=lambda line: line[:40],
)
def test_metrics_that_no_run_wrote(command: Command, line: str) -> None:
    command.works("--steps=2")
    path = command.out / "metrics.jsonl"
    first, *others = path.read_text(encoding="utf-8").splitlines()
    written = "\n".join([first, line, *others, ""])
    path.write_text(written, encoding="utf-8")
    kept = command.out / "corrupted" / "metrics-1" / "metrics.jsonl"
    assert f"{path}: line 2 is corrupted; it was moved to {kept.parent}" in resumed(command, "--steps=3")
    assert kept.read_text(encoding="utf-8") == written
    assert [step for step, _ in losses_of(command.out)] == [3]


@pytest.mark.parametrize("options", ["", "--checkpoint=trajectory", "--optimizer=agzo --record-frames"])
def test_without_a_checkpoint_the_trajectory_is_kept(command: Command, options: str) -> None:
    command.works(*COMMON, *options.split())
    path = command.out / "trajectory.jsonl"
    corrupt(path, "flipped")
    before = {found.name: found.read_bytes() for found in command.out.glob("trajectory.*")}
    shutil.rmtree(command.out / "checkpoints")
    kept = command.out / "corrupted" / "trajectory-1"
    told = resumed(command, LAST)
    assert f"warning: {command.out / 'checkpoints'}: contains no checkpoint; the run starts again" in told
    assert f"its trajectory was moved to {kept}\n" in told
    assert {found.name: found.read_bytes() for found in kept.iterdir()} == before
    assert open_recording(path).header.step == 0
    assert_as_in_peace(command, *options.split())


def test_without_a_checkpoint_no_stale_base_is_left(command: Command) -> None:
    command.works(*COMMON)
    corrupt(command.out / "trajectory.jsonl", "flipped")
    resumed(command, "--steps=6")
    shutil.rmtree(command.out / "checkpoints")
    resumed(command, LAST)
    kept = command.out / "corrupted" / "trajectory-2"
    assert {path.name for path in kept.iterdir()} == {"trajectory.base", "trajectory.jsonl"}
    assert not (command.out / "trajectory.base").exists()
    assert_as_in_peace(command)


def test_without_a_checkpoint_a_header_alone_is_replaced(command: Command) -> None:
    command.works(*COMMON)
    path = command.out / "trajectory.jsonl"
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n" + b'{"torn')
    shutil.rmtree(command.out / "checkpoints")
    assert resumed(command, LAST) == ""
    assert not (command.out / "corrupted").exists()
    assert_as_in_peace(command)


def test_a_report_says_where_its_metrics_begin(command: Command) -> None:
    command.works(*COMMON)
    arguments = [part for part in command.arguments("--resume", LAST) if part != "--quiet"]
    (command.out / "metrics.jsonl").unlink()
    assert main(arguments) == 0
    said = command.capsys.readouterr().out
    assert "held-out, at step 5: loss " in said
    assert "held-out, after:     loss " in said
    command.works(*COMMON, "--overwrite")
    assert main(arguments) == 0
    said = command.capsys.readouterr().out
    assert "held-out, before: loss " in said
    assert "held-out, after:  loss " in said
