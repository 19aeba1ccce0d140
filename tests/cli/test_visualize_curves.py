"""``zoext visualize curves`` draws the metrics of runs and tells the runs apart."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from zoext.cli import main
from zoext.cli._pictures import curve_figure, curves, style


def write_run(folder: Path, steps: int = 7, accuracy: bool = True, **settings: Any) -> Path:
    """The files of a run that the command reads."""
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for step in range(steps):
        evaluation = {"valid_loss": 0.7 - 0.02 * step, "valid_loss_error": 0.03}
        if accuracy:
            evaluation |= {"valid_accuracy": 0.5 + 0.04 * step, "valid_accuracy_error": 0.02}
        if step % 3 == 0:
            records.append({"step": step, "forwards": 2 * step, **evaluation})
        records.append(
            {"step": step + 1, "forwards": 2 * step + 2, "loss": 0.7 - 0.01 * step, "seconds": 0.1}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if settings:
        (folder / "run.json").write_text(json.dumps({"settings": settings, "data": "", "checksum": ""}))
    return folder


def labels(*folders: Path) -> list[str]:
    return [curve.label for curve in curves.read(folders)]


def test_labels_are_the_settings_that_differ(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", optimizer="mezo", lr=1e-4, mu=1e-3, seed=0, device="cpu", options={})
    second = write_run(
        tmp_path / "b", optimizer="agzo", lr=4e-4, mu=1e-3, seed=0, device=None, options={"rank": "2"}
    )
    assert labels(first, second) == ["mezo, options none, lr 0.0001", "agzo, options rank=2, lr 0.0004"]
    assert labels(first) == ["a"]


def test_labels_of_settings_that_only_some_versions_have(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", lr=1e-4)
    second = write_run(tmp_path / "b", lr=1e-4, schedule="cosine", model="models/large")
    assert labels(first, second) == ["schedule none, model none", "schedule cosine, model large"]


def test_equal_labels_get_the_names_of_the_folders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place / "run", lr=lr) for place, lr in (("x", 0.1), ("y", 0.1), ("z", 0.2))]
    assert labels(*runs) == ["x/run, lr 0.1", "y/run, lr 0.1", "lr 0.2"]
    assert labels(*runs[:2]) == ["x/run", "y/run"]


def test_a_run_without_settings_has_the_name_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, known = write_run(tmp_path / "foreign"), write_run(tmp_path / "known", lr=0.1)
    assert labels(foreign, known) == ["foreign", "lr 0.1"]
    (known / "run.json").write_text('{"settings": ')
    assert labels(foreign, known) == ["foreign", "known"]
    assert f"warning: {known / 'run.json'}: corrupted" in capsys.readouterr().err


def test_what_is_drawn(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "long", steps=200), write_run(tmp_path / "short", steps=4, accuracy=False)]
    with style.new_figure(6, 3) as figure:
        curve_figure.draw(figure, curves.read(runs))
        training, loss, accuracy = figure.axes
        assert [len(line.get_xdata()) for line in training.get_lines()] == [200, 4]
        assert training.get_lines()[0].get_xdata()[-1] == 400
        assert training.get_lines()[1].get_ydata()[0] == pytest.approx(0.7)
        assert [len(bars.lines[0].get_xdata()) for bars in loss.containers] == [67, 2]
        assert loss.containers[1].lines[0].get_ydata() == pytest.approx([0.7, 0.64])
        (bars,) = loss.containers[1].lines[2]
        low, high = bars.get_segments()[1][:, 1]
        assert (low, high) == pytest.approx((0.61, 0.67))
        assert len(accuracy.containers[0].lines[0].get_xdata()) == 67
        assert len(accuracy.containers[1].lines[0].get_xdata()) == 0


def test_no_panel_for_accuracy_where_there_is_none(tmp_path: Path) -> None:
    read = curves.read([write_run(tmp_path / "run", accuracy=False)])
    with style.new_figure(6, 3) as figure:
        curve_figure.draw(figure, read)
        assert len(figure.axes) == 2


@pytest.mark.parametrize(("kind", "begin"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_files(kind: str, begin: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "run", steps=4, lr=0.1), tmp_path / "pictures"
    command = ["visualize", "curves", str(run), "--out", str(out), f"--format={kind}"]
    assert main(command) == 0
    assert (
        "run: loss 0.6400 ± 0.0300, accuracy 0.6200 ± 0.0200 after 6 forward passes"
        in capsys.readouterr().out
    )
    picture = out / f"curves.{kind}"
    first = picture.read_bytes()
    assert first.startswith(begin)
    (numbers,) = json.loads((out / "curves.json").read_text())["curves"]
    assert [record["loss"] for record in numbers["steps"]] == pytest.approx([0.7, 0.69, 0.68, 0.67])
    assert main([*command, "--overwrite", "--quiet"]) == 0
    assert picture.read_bytes() == first
    assert capsys.readouterr().out == ""


def test_a_line_that_is_not_complete_yet_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "forw')
    assert len(curves.read([run])[0].steps) == 4


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["visualize", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("zoext: error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_existing_files_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "pictures"
    out.mkdir()
    for name in ("curves.png", "curves.json"):
        (out / name).write_text("mine")
        error = refused(capsys, "curves", run, "--out", out)
        assert error.endswith(f"{name} exists; give --overwrite or another --out\n")
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    assert list(out.iterdir()) == []
    assert "--format" in refused(capsys, "curves", run, "--out", out, "--format=gif")
    assert "is not a folder" in refused(capsys, "curves", run, "--out", run / "metrics.jsonl")
    (out / "curves.png").mkdir()
    assert "curves.png is a folder" in refused(capsys, "curves", run, "--out", out, "--overwrite")


def test_runs_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, run, empty = tmp_path / "pictures", write_run(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    error = refused(capsys, "curves", run, empty, "--out", out)
    assert f"RUN {empty}: has no metrics.jsonl; give the folder of a run of zoext finetune" in error
    (empty / "metrics.jsonl").touch()
    assert "no complete line yet" in refused(capsys, "curves", run, empty, "--out", out)
    assert "given twice" in refused(capsys, "curves", run, run / ".." / "run", "--out", out)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], '{"step": 1}', *lines[1:]]) + "\n")
    error = refused(capsys, "curves", run, "--out", out)
    assert re.search(r"metrics\.jsonl: line 2 is corrupted; leave out this run, or repeat it\n", error)
    assert not out.exists()


def test_pictures_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert "PICTURE" in refused(capsys)
    assert "'curves'" in refused(capsys, "curve")


@pytest.mark.parametrize("picture", [("functions",), ("slice",), ("curves", "run")])
def test_without_matplotlib(
    picture: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = refused(capsys, *picture, "--out", tmp_path / "pictures")
    assert "needs matplotlib, not installed here: pip install 'zoext[finetune]'" in error


def test_settings_of_matplotlib_do_not_change() -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31}):
        with style.new_figure(2, 1):
            assert matplotlib.rcParams["font.size"] == 8
        assert matplotlib.rcParams["font.size"] == 31
