"""A trajectory or its side file that is damaged raises a TrajectoryError, and nothing changes."""

from __future__ import annotations

import copy
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import zoext
from support.faulty_runs import FaultyRun
from support.graphed_runs import same
from support.trajectory_files import forge, record, record_mezo, records, refused, write_bodies
from zoext.trajectory import TrajectoryError


@pytest.fixture
def run(tmp_path: Path) -> tuple[nn.Module, Path]:
    return record_mezo(tmp_path / "run.jsonl")


# The lines


def test_any_flipped_byte(run: tuple[nn.Module, Path]) -> None:
    """At the border of each field, and anywhere else."""
    base, path = run
    data = path.read_bytes()
    borders = [i for i, byte in enumerate(data) if byte in b'{}[]:,"\n'][::7]
    numbers = [i for i, byte in enumerate(data) if byte in b"0123456789"][::23]
    checksums = [data.index(b'"crc32":"', i) + 9 + i % 8 for i in range(0, len(data) - 700, 300)]
    newlines = [i for i, byte in enumerate(data) if byte == ord("\n")]
    generator = random.Random(4)
    anywhere = [generator.randrange(len(data)) for _ in range(100)]
    for place in [*borders, *numbers, *checksums, *newlines[:-1], *anywhere, 0]:
        flipped = data[place] ^ 1 << generator.randrange(8)
        path.write_bytes(data[:place] + bytes([flipped]) + data[place + 1 :])
        line = data[:place].count(b"\n") + 1
        if place < len(data) - 1:
            refused(base, path, str(path), f"line {line} ")


@pytest.mark.parametrize("last", [b"", b" ", b"\x0b", b"}", bytes(500), b'\x0b{"step":5,"se'])
def test_a_last_newline_that_is_lost_loses_no_step(run: tuple[nn.Module, Path], last: bytes) -> None:
    """The line is whole; who goes on with the file gives it its newline back."""
    base, path = run
    data = path.read_bytes()
    expected, found = copy.deepcopy(base), copy.deepcopy(base)
    zoext.replay(expected, path)
    path.write_bytes(data[:-1] + last)
    optimizer = zoext.replay(found, path)
    assert optimizer.param_groups[0]["step"] == 4
    assert same(found.state_dict(), expected.state_dict())
    for parameter in found.parameters():
        parameter.requires_grad_(True)
    zoext.Trajectory(path, optimizer, resume=True).close()
    assert path.read_bytes() == data


def test_a_torn_last_line_is_left_out(run: tuple[nn.Module, Path]) -> None:
    base, path = run
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    expected = []
    for step in range(5):
        model = copy.deepcopy(base)
        zoext.replay(model, path, to_step=step)
        expected.append(model)
    for size in [
        *range(ends[0], len(data), 61),
        *ends,
        *(end - 1 for end in ends),
        *(end - 2 for end in ends[1:]),
    ]:
        path.write_bytes(data[:size])
        model = copy.deepcopy(base)
        step = zoext.replay(model, path).param_groups[0]["step"]
        assert step == sum(end - 1 <= size for end in ends) - 1
        assert same(model.state_dict(), expected[step].state_dict())
    path.write_bytes(data[: ends[2]] + bytes(500))  # what a power cut may leave
    assert zoext.replay(copy.deepcopy(base), path).param_groups[0]["step"] == 2


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_torn_header(run: tuple[nn.Module, Path], size: int) -> None:
    base, path = run
    path.write_bytes(path.read_bytes().splitlines()[0][:size])
    refused(base, path, f"{path}: has no header")


Lines = list[bytes]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda rows: [rows[0], *rows[2:]], 2),
        (lambda rows: [*rows[:3], rows[4]], 4),
        (lambda rows: rows[1:], 1),
        (lambda rows: [rows[0], rows[2], rows[1], *rows[3:]], 2),
        (lambda rows: [*rows[:3], rows[2], *rows[3:]], 4),
        (lambda rows: [rows[0], *rows], 2),
        (lambda rows: [*rows[:2], b"\n", *rows[2:]], 3),
        (lambda rows: [*rows[:2], b"{}\n", *rows[2:]], 3),
        (lambda rows: [*rows, *rows], 6),
    ],
)
def test_lines_that_are_missing_swapped_doubled_or_strange(
    run: tuple[nn.Module, Path], change: Callable[[Lines], Lines], line: int
) -> None:
    base, path = run
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    refused(base, path, f"{path}: line {line} ")


def test_the_steps_before_the_damage_can_be_replayed(run: tuple[nn.Module, Path]) -> None:
    base, path = run
    data = path.read_bytes()
    path.write_bytes(data[:-40] + b"x" + data[-39:])
    refused(base, path, "line 5 ", "to_step=3")
    assert zoext.replay(base, path, to_step=3).param_groups[0]["step"] == 3


@pytest.mark.parametrize("content", [b"\n", b"{}\n", b"\xff\xfe\x00", b"PK\x03\x04" * 99 + b"\n", bytes(99)])
def test_files_of_something_else(run: tuple[nn.Module, Path], content: bytes) -> None:
    base, path = run
    path.write_bytes(content)
    refused(base, path, str(path))


def test_a_file_or_folder_that_cannot_be_read(run: tuple[nn.Module, Path]) -> None:
    base, path = run
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        zoext.replay(base, path.with_name("no.jsonl"))
    with pytest.raises(IsADirectoryError):
        zoext.replay(base, path.parent)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.replace(b'"step":1', b'"step":2'), "line 2 "),
        (lambda data: data[:-300], "ends with step"),
        (lambda data: b"", "no header"),
    ],
)
def test_a_damaged_file_is_not_gone_on_with(
    damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    _, run = record(path)
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(TrajectoryError, match=message):
        zoext.Trajectory(path, run.optimizer, resume=True)
    assert path.read_bytes() == damaged
    assert run.optimizer.recorder is None


# The side file


@pytest.fixture
def agzo(tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    """The model that a run of AGZO began with, its trajectory and the file of its bases."""
    path = tmp_path / "run.jsonl"
    base, _ = record(path, recipe="agzo")
    return base, path, tmp_path / "run.frames"


def test_frames_that_are_missing_or_damaged(agzo: tuple[nn.Module, Path, Path]) -> None:
    base, path, beside = agzo
    data = beside.read_bytes()
    generator = random.Random(6)
    for place in [0, 7, 8, len(data) - 1, *(generator.randrange(len(data)) for _ in range(40))]:
        beside.write_bytes(
            data[:place] + bytes([data[place] ^ 1 << generator.randrange(8)]) + data[place + 1 :]
        )
        refused(base, path, f"{beside}: corrupted at byte ")
    for size in (0, 1, len(data) // 2, len(data) - 1):
        beside.write_bytes(data[:size])
        refused(base, path, f"{beside}: ", "is missing")
    beside.unlink()
    refused(base, path, f"{beside}: is missing")
    beside.mkdir()
    with pytest.raises(IsADirectoryError):
        zoext.replay(base, path)


def test_only_the_frames_of_the_steps_that_are_replayed_count(agzo: tuple[nn.Module, Path, Path]) -> None:
    base, path, beside = agzo
    beside.write_bytes(beside.read_bytes()[:-1])
    assert zoext.replay(base, path, to_step=3).param_groups[0]["step"] == 3


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (lambda offset: [offset, 2**62, 1], "is missing"),
        (lambda offset: [offset, 2**62 - 1, 1], "is missing"),
        (lambda offset: [2**62, 1, 1], "offset"),
        (lambda offset: [-1, 8, 1], "frame must be"),
        (lambda offset: [offset, 8], "frame must be"),
        (lambda offset: [offset, 8, 1, 1], "frame must be"),
        (lambda offset: [float(offset), 8, 1], "frame must be"),
        (lambda offset: [offset + 8, 8, 1], "offset"),
        (lambda offset: [offset, 0, 0], "corrupted"),
        (lambda offset: None, "frame must be"),
        (lambda offset: {}, "frame must be"),
    ],
)
def test_places_that_are_hostile(
    agzo: tuple[nn.Module, Path, Path], frame: Callable[[int], object], message: str
) -> None:
    base, path, _ = agzo
    forge(path, 5, lambda row: row.update(frame=frame(row["frame"][0])))
    refused(base, path, str(path.with_suffix("")), message)


def test_places_that_overlap(agzo: tuple[nn.Module, Path, Path]) -> None:
    base, path, _ = agzo
    frame = records(path)[1]["frame"]
    forge(path, 3, lambda row: row.update(frame=frame))
    refused(base, path, f"{path}: line 3: frame has the offset 0, not {frame[1]}")


def test_headers_and_lines_that_disagree_about_frames(agzo: tuple[nn.Module, Path, Path]) -> None:
    base, path, _ = agzo
    original = path.read_bytes()
    forge(path, 3, lambda row: row.pop("frame"))
    refused(base, path, f"{path}: line 3: has no frame")
    path.write_bytes(original)
    forge(path, 1, lambda row: row.update(frames=False))
    refused(base, path, f"{path}: line 2: has a frame")
    path.write_bytes(original)
    low_rank = {"name": "LowRank", "rank": 2, "refresh_interval": 3, "scale": "paper"}
    forge(path, 1, lambda row: row["recipe"].update(direction=low_rank))
    refused(base, path, f"{path}: line 1: frames must be false")


def replace_frame(
    path: Path, beside: Path, change: Callable[[dict[str, torch.Tensor]], object], line: int = 3
) -> None:
    """Changes the factors of a step, with the right places and checksums."""
    found, data, end = records(path), beside.read_bytes(), 0
    documents = []
    for number, row in enumerate(found[1:], 2):
        offset, length, _ = row["frame"]
        document = data[offset : offset + length]
        if number == line:
            factors = load(document)
            change(factors)
            document = save(factors)
        row["frame"] = [end, len(document), zlib.crc32(document)]
        end += len(document)
        documents.append(document)
    beside.write_bytes(b"".join(documents))
    write_bodies(path, [json.dumps(row).encode() for row in found])


@pytest.mark.parametrize(
    "change",
    [
        lambda factors: factors.update({"right.0": torch.ones(2, 4)}),
        lambda factors: factors.update({"right.0": torch.ones(1, 3)}),
        lambda factors: factors.update({"right.0": torch.ones(7, 3)}),
        lambda factors: factors.update({"right.0": torch.ones(0, 3)}),
        lambda factors: factors.update({"right.0": torch.ones(3)}),
        lambda factors: factors.update({"right.0": torch.ones(1, 2, 3)}),
        lambda factors: factors.update({"right.0": torch.ones(2, 3).double()}),
        lambda factors: factors.update({"right.0": torch.ones(2, 3, dtype=torch.int32)}),
        lambda factors: factors.update({"right.1": torch.ones(2, 1)}),
        lambda factors: factors.update({"right.1": torch.ones(1, 1)}),
        lambda factors: factors.update({"left.0": torch.ones(2, 4)}),
        lambda factors: factors.update({"right.99": torch.ones(2, 3)}),
        lambda factors: factors.update({"right.-1": torch.ones(2, 4)}),
        lambda factors: factors.update({"up.0": torch.ones(2, 3)}),
        lambda factors: factors.update({"right": torch.ones(2, 3)}),
        lambda factors: factors.update({"right.x": torch.ones(2, 3)}),
        lambda factors: factors.update({"left.0": factors.pop("right.0").new_ones(2, 4)}),
    ],
)
def test_factors_that_do_not_fit(
    agzo: tuple[nn.Module, Path, Path], change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    base, path, beside = agzo
    replace_frame(path, beside, lambda factors: None)
    zoext.replay(copy.deepcopy(base), path)
    replace_frame(path, beside, change)
    refused(base, path, f"{beside}: corrupted at byte ")


def test_a_side_file_that_is_missing_or_damaged_is_not_gone_on_with(tmp_path: Path) -> None:
    path, beside = tmp_path / "run.jsonl", tmp_path / "run.frames"
    _, run = record(path, recipe="agzo")
    lines, data = path.read_bytes(), beside.read_bytes()
    for damaged, how in ((data[:-1], "is too short"), (b"\x01" + data[1:], "corrupted at byte 0")):
        beside.write_bytes(damaged)
        with pytest.raises(TrajectoryError, match=rf"run\.frames: {how}"):
            zoext.Trajectory(path, run.optimizer, resume=True)
        assert beside.read_bytes() == damaged
    beside.unlink()
    with pytest.raises(TrajectoryError, match=r"run\.frames: is missing"):
        zoext.Trajectory(path, run.optimizer, resume=True)
    assert path.read_bytes() == lines


def test_frames_are_not_asked_for_in_vain(tmp_path: Path) -> None:
    run = FaultyRun("agzo")
    path = tmp_path / "run.jsonl"
    with pytest.warns(UserWarning, match="frames=True"), zoext.Trajectory(path, run.optimizer):
        run.step()
    with pytest.raises(TrajectoryError, match="begun without frames"):
        zoext.Trajectory(path, run.optimizer, frames=True, resume=True)
    with zoext.Trajectory(path, run.optimizer, resume=True):
        run.step()
    refused(FaultyRun("agzo").model, path, "without the bases of AGZO", "frames=True")


def test_a_trajectory_with_the_name_of_its_own_side_file(tmp_path: Path) -> None:
    run = FaultyRun("agzo")
    with pytest.raises(ValueError, match=r"run\.frames, the name of its own side file"):
        zoext.Trajectory(tmp_path / "run.frames", run.optimizer, frames=True)
    assert not list(tmp_path.iterdir())
