"""``torchrun -m zoext finetune`` is one run: it writes and prints once, with the bits it should have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import environment
from support.forking_server import Kill
from support.launched_commands import Launched, Launcher
from support.tiny_models import labelled, tiny_bert

OPTIONS = "--steps=5 --eval-every=3 --checkpoint-every=2 --lr=1e-2 --mu=2e-3 --weight-decay=0.1 --device=cpu"
FILES = {
    *("checkpoints", "config.toml", "first-evaluation.json", "metrics.jsonl", "model", "run.json"),
    "trajectory.jsonl",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_bert(folder / "model")
    labelled(folder / "words.jsonl")
    return folder


def finetune(launcher: Launcher, folder: Path, *more: str, where: Path | None = None, **how: Any) -> Launched:
    inputs = [f"--model={folder / 'model'}", f"--data={folder / 'words.jsonl'}"]
    return launcher.run(["finetune", *inputs, *OPTIONS.split(), *more], where or folder, **how)


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, folder: Path) -> Path:
    """A run on two ranks, each of which has a part of the batch."""
    out = folder / "undisturbed"
    assert finetune(launcher, folder, "--batch-size=7", f"--out={out}", "--quiet").failed == {}
    return out


def result(out: Path) -> dict[str, object]:
    """Everything that a run writes except seconds, and what shows how it was started."""
    assert {path.name for path in out.iterdir()} - {"trajectory.jsonl.cut"} == FILES
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        record.pop("seconds", None)
    names = ["trajectory.jsonl", "model/model.safetensors"]
    names += [f"checkpoints/step-{step:08}/weights.safetensors" for step in (4, 5)]
    return {"metrics": metrics, **{name: (out / name).read_bytes() for name in names}}


def test_probes_have_the_bits_of_one_process(launcher: Launcher, folder: Path, tmp_path: Path) -> None:
    options = ["--optimizer=mezo-greedy", "--dtype=bfloat16", "--precision=residual", "--batch-size=7"]
    for count, out in ((1, "one"), (3, "three")):
        more = [*options, f"--out={tmp_path / out}", "--parallel=probes"]
        assert finetune(launcher, folder, *more, ranks=count).failed == {}
    assert result(tmp_path / "three") == result(tmp_path / "one")


def test_ranks_stop_early_together_and_keep_the_best_step(
    launcher: Launcher, folder: Path, tmp_path: Path
) -> None:
    options = "--lr=0.03 --seed=3 --batch-size=4 --steps=20 --eval-every=2 --patience=2 --keep=best --quiet"
    for count, out in ((1, "one"), (2, "two")):
        more = [*options.split(), "--gradient-accumulation=2", f"--out={tmp_path / out}", "--parallel=probes"]
        assert finetune(launcher, folder, *more, ranks=count).failed == {}
    names = ("trajectory.jsonl", "model/model.safetensors", "first-evaluation.json")
    one, two = ([(tmp_path / out / name).read_bytes() for name in names] for out in ("one", "two"))
    assert one == two
    steps = len(one[0].splitlines()) - 1
    assert steps < 20
    saved = load_file(tmp_path / "two" / "checkpoints" / f"step-{steps:08}" / "weights.safetensors")
    kept = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert not saved["classifier.weight"].equal(kept["classifier.weight"])


@pytest.mark.parametrize("size", [7, 2])  # two examples on three ranks: one has none
def test_parts_of_a_batch_have_the_loss_of_the_whole(
    launcher: Launcher, folder: Path, tmp_path: Path, size: int
) -> None:
    printed = []
    for count, out in ((1, "one"), (3, "three")):
        ended = finetune(launcher, folder, f"--batch-size={size}", f"--out={tmp_path / out}", ranks=count)
        assert ended.failed == {}
        printed.append(ended.out.replace(str(tmp_path / out), "OUT").splitlines())
    for one, three in zip(*printed, strict=True):
        assert [word for word in three.split() if "." not in word] == [
            word for word in one.split() if "." not in word
        ]
    one, three = result(tmp_path / "one"), result(tmp_path / "three")
    assert three["metrics"] == [pytest.approx(record, rel=1e-4, abs=1e-6) for record in one["metrics"]]
    ours, theirs, base = (
        load_file(path / "model.safetensors")
        for path in (tmp_path / "three/model", tmp_path / "one/model", folder / "model")
    )
    assert not torch.equal(ours["classifier.weight"], base["classifier.weight"])
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("on", [0, 1])
def test_a_killed_rank_is_restarted(
    launcher: Launcher, folder: Path, tmp_path: Path, undisturbed: Path, on: int
) -> None:
    """Also without --out: the restarted ranks continue the run that the killed ones began."""
    out = "" if on else f"--out={tmp_path / 'runs/finetune-1'}"
    more = [*filter(None, [out]), "--batch-size=7", "--quiet"]
    kill = Kill("forward", 13 * 10)  # in the last step
    ended = finetune(launcher, folder, *more, kill=kill, on=on, restarts=1, where=tmp_path)
    assert ended.failed == {}
    assert "SIGKILL" in ended.err
    assert ended.said == []
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["finetune-1"]
    assert result(tmp_path / "runs/finetune-1") == result(undisturbed)


def test_a_restart_continues_no_other_run(launcher: Launcher, folder: Path, undisturbed: Path) -> None:
    before = result(undisturbed)
    ended = finetune(launcher, folder, "--batch-size=7", f"--out={undisturbed}", restarts=1)
    assert set(ended.failed.values()) == {2}
    assert len(ended.said) == 2  # one of each attempt
    assert all("already holds a run; give --resume" in line for line in ended.said)
    assert result(undisturbed) == before


def test_an_error_on_one_rank_ends_all(launcher: Launcher, folder: Path, tmp_path: Path) -> None:
    """The disk of the first rank is full, and the others wait for it in the next step."""
    out = tmp_path / "run"
    ended = finetune(launcher, folder, f"--out={out}", "--quiet", file_size=5000)
    assert set(ended.failed.values()) == {2}
    assert len(ended.said) == 1
    assert f"then zoext finetune --out {out} --resume" in ended.said[0]
    assert "zoext/cli" not in ended.err  # a traceback


def test_an_error_on_all_ranks_is_printed_once(launcher: Launcher, folder: Path, tmp_path: Path) -> None:
    ended = finetune(launcher, folder, f"--out={tmp_path / 'run'}", "--data=none.jsonl")
    assert set(ended.failed.values()) == {2}
    assert len(ended.said) == 1
    assert "error: --data none.jsonl: no such file" in ended.said[0]
    assert not (tmp_path / "run").exists()


def test_probes_in_place_are_not_dealt_out(launcher: Launcher, folder: Path, tmp_path: Path) -> None:
    more = ["--parallel=probes", "--probe=inplace", f"--out={tmp_path / 'run'}"]
    ended = finetune(launcher, folder, *more)
    assert set(ended.failed.values()) == {2}
    assert "--parallel probes: " in ended.said[0]
    assert "--probe streamed" in ended.said[0]


def test_another_number_of_ranks_is_reported(launcher: Launcher, folder: Path, tmp_path: Path) -> None:
    out = f"--out={tmp_path / 'run'}"
    assert finetune(launcher, folder, out, "--quiet").said == []
    ended = launcher.run(["finetune", out, "--resume", "--steps=6", "--quiet"], folder, ranks=3)
    assert ended.failed == {}
    assert len(ended.said) == 1
    assert "each batch is divided by 3, and was by 2" in ended.said[0]


def test_torchrun_runs_the_module(folder: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "zoext", "info"],
        env=environment(OMP_NUM_THREADS="1"),
        cwd=folder,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("instruction sets:") == 1
