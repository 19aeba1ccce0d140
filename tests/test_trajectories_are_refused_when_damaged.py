"""A trajectory that is damaged, hostile or of another run raises a TrajectoryError, and nothing changes."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import FaultyRun
from graphed_runs import same
from safetensors.torch import load, save
from torch import nn
from trajectory_files import forge, forge_text, record, records, write_bodies

import zoext
from zoext.trajectory import TrajectoryError, header, lines

Target = nn.Module | zoext.ZerothOrderOptimizer


def refused(target: Target, path: Path, *messages: str, **options: Any) -> TrajectoryError:
    """The error of a replay, which leaves the target and all files alone."""
    tensors = target.state_dict() if isinstance(target, nn.Module) else {}
    parameters = (
        list(target.parameters())
        if isinstance(target, nn.Module)
        else [tensor for group in target.param_groups for tensor in group["params"]]
    )
    tensors |= {str(number): tensor for number, tensor in enumerate(parameters)}
    before = copy.deepcopy({name: tensor.detach() for name, tensor in tensors.items()})
    flags = [parameter.requires_grad for parameter in parameters]
    files = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(TrajectoryError) as raised:
        zoext.replay(target, path, **options)
    assert same({name: tensor.detach() for name, tensor in tensors.items()}, before)
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == files
    for message in messages:
        assert message in str(raised.value)
    assert len(str(raised.value)) < 1500
    return raised.value


@pytest.fixture
def run(tmp_path: Path) -> tuple[nn.Module, Path]:
    """The model that a run of MeZO began with, and its trajectory of four steps."""
    path = tmp_path / "run.jsonl"
    base, _ = record(path)
    base[3].bias.requires_grad_(False)
    return base, path


# Damage


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


# Another run


def test_another_model(run: tuple[nn.Module, Path]) -> None:
    base, path = run
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    refused(other, path, f"{path}: is of another model", "2.weight")
    wide = copy.deepcopy(base)
    wide[3] = nn.Linear(4, 5)
    refused(wide, path, "begins with another model: 3.weight is float32 [5, 4], not float32 [3, 4]")
    refused(copy.deepcopy(base).half(), path, "0.weight is float16 [4, 3], not float32 [4, 3]")
    with torch.no_grad():
        base[0].bias[2] = torch.nextafter(base[0].bias[2], torch.tensor(9.0))
    refused(base, path, "begins with other weights: 0.bias has other weights (1 of")


def test_weights_that_differ_in_the_sign_of_a_zero(run: tuple[nn.Module, Path]) -> None:
    base, path = run
    with torch.no_grad():
        base[2].special[0] = 0.0
    refused(base, path, "2.special has other weights")


def test_an_optimizer_that_is_not_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, recipe="lozo", dtype=torch.bfloat16, precision="residual")
    for recipe, options, message in [
        ("mezo", {"precision": "residual"}, "its recipe is"),
        ("lozo", {"precision": "nearest"}, "its precision is residual, the optimizer has nearest"),
        ("lozo", {"precision": "residual", "seed": 7}, "its seed is"),
    ]:
        other = FaultyRun(recipe, torch.bfloat16, **options)
        refused(other.optimizer, path, message)
    moved = FaultyRun("lozo", torch.bfloat16, precision="residual")
    moved.step()
    refused(moved.optimizer, path, "its step is 0, the optimizer has 1")
    fresh = FaultyRun("lozo", torch.bfloat16, precision="residual")
    moved.optimizer.param_groups[0]["step"] = 0
    moved.model.load_state_dict(fresh.model.state_dict())
    refused(moved.optimizer, path, "remembers")
    groups = [{"params": list(part.parameters())} for part in fresh.model]
    apart = zoext.ZerothOrderOptimizer(
        groups,
        direction=zoext.LowRank(rank=2, refresh_interval=3),
        seed=2**64 - 5,
        precision="residual",
        probe=zoext.StreamedProbe(fresh.model),
    )
    refused(apart, path, "is of other groups of parameters")


def test_several_of_which_one_does_not_fit(run: tuple[nn.Module, Path], tmp_path: Path) -> None:
    base, path = run
    other = tmp_path / "other.jsonl"
    shutil.copy(path, other)
    forge(other, 1, lambda row: row["groups"][0]["parameters"][0].update(digest="0" * 32))
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(TrajectoryError, match="other weights"):
        zoext.replay(base, [path, other])
    assert same(base.state_dict(), before)
    assert not base[3].bias.requires_grad


@pytest.mark.parametrize("field", ["version", "noise_field"])
@pytest.mark.parametrize("packages", [{"zoext": "9.1"}, {}, {"zoext": [7]}, "strange", None])
def test_a_later_version(run: tuple[nn.Module, Path], field: str, packages: object) -> None:
    base, path = run
    forge(path, 1, lambda row: row.update({field: 2, "packages": packages, "groups": "of another kind"}))
    error = refused(base, path, f"{path}: line 1: {field} is 2", "this zoext reads 1", "install")
    assert ("9.1" in str(error)) == (packages == {"zoext": "9.1"})


def test_the_version_that_is_read_is_the_one_that_is_written() -> None:
    assert (header.VERSION, header.NOISE_FIELD) == (1, 1)


# Hostile lines with good checksums

ANYTHING = [
    None,
    True,
    -1,
    2**70,
    10**4000,
    1.5,
    1e308,
    "",
    "x" * 99,
    [],
    {},
    [[]],
    [None],
    [True],
    [-1],
    [2**70],
]
ANYTHING += [[1e308] * 3, ["x"], {"a": 1}, [{}], [[0]], [[0, 2**62]], [[-1, 2]], [[2, 1]], [[0, 1], [0, 1]]]
HEADER = (
    "format",
    "version",
    "noise_field",
    "recipe",
    "precision",
    "seed",
    "step",
    "frames",
    "exact",
    "groups",
    "notes",
)
STEP = ("step", "seeds", "coefficients", "lr", "loss", "spread", "finite", "forwards", "mu", "weight_decay")
# What is as good as what was there: numbers that only the reader of a log looks at.
HARMLESS = {
    "notes": [{}, {"a": 1}],
    "loss": [None, -1, 2**70, 1.5, 1e308],
    "spread": [None, -1, 2**70, 1.5, 1e308],
    "finite": [True],
    "exact": [True],
    "frames": [True],  # found out at the first step
    "lr": [[-1], [2**70]],
    "mu": [[2**70]],
    "weight_decay": [[-1], [2**70]],
}


@pytest.mark.parametrize(
    ("line", "field"),
    [
        *((1, field) for field in HEADER),
        *((2, field) for field in STEP),
        (2, "moves"),
        (3, "step"),
        (3, "lr"),
    ],
)
def test_fields_of_a_wrong_type_or_value(run: tuple[nn.Module, Path], line: int, field: str) -> None:
    base, path = run
    original = path.read_bytes()
    for value in ANYTHING:
        if any(value == good and type(value) is type(good) for good in HARMLESS.get(field, [])):
            continue
        path.write_bytes(original)
        try:
            forge(path, line, lambda row, value=value: row.update({field: value}))
        except ValueError:  # json refuses to write integers that it refuses to read
            continue
        # A header's format that is another one is no trajectory at all.
        refused(base, path, f"{path}: line {line}: ", "" if field == "format" else field.removesuffix("s"))


@pytest.mark.parametrize("value", [None, -1, 2**70, 1e308, 1e-300])
@pytest.mark.parametrize("field", ["loss", "spread"])
def test_harmless_numbers(run: tuple[nn.Module, Path], field: str, value: object) -> None:
    base, path = run
    forge(path, 3, lambda row: row.update({field: value}))
    zoext.replay(base, path)


@pytest.mark.parametrize(
    ("line", "field"), [*((1, name) for name in HEADER), *((2, name) for name in STEP), (2, "moves")]
)
def test_missing_fields(run: tuple[nn.Module, Path], line: int, field: str) -> None:
    base, path = run
    forge(path, line, lambda row: row.pop(field))
    refused(base, path, f"{path}: line {line}: ", "header" if field == "format" else field)


@pytest.mark.parametrize("field", ["name", "key", "shape", "dtype", "digest"])
def test_fields_of_a_parameter(run: tuple[nn.Module, Path], field: str) -> None:
    base, path = run
    original = path.read_bytes()
    dtypes = [
        "float32",
        "torch",
        "torch.",
        "torch.nn",
        "torch.torch.float32",
        "torch._dynamo",
        "torch.float7",
    ]
    values = [value for value in ANYTHING if value != 10**4000]
    for value in values + (dtypes if field == "dtype" else []):
        path.write_bytes(original)
        forge(path, 1, lambda row, value=value: row["groups"][0]["parameters"][1].update({field: value}))
        refused(base, path, str(path))
    path.write_bytes(original)
    forge(path, 1, lambda row: row["groups"][0]["parameters"][1].pop(field))
    refused(base, path, f"{path}: line 1: groups[0]: parameters[1]: has no field '{field}'")


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.append(rows[0] | {"key": len(rows)}),
        lambda rows: rows.pop(),
        lambda rows: rows.reverse(),
        lambda rows: rows[1].update(key=5),
        lambda rows: rows[1].update(name=rows[0]["name"]),
        lambda rows: rows[1].update(shape=[2**62] * 9),
        lambda rows: rows[1].update(name="\ud800\x1b[2J" * 1000),
    ],
)
def test_parameters_that_do_not_add_up(
    run: tuple[nn.Module, Path], change: Callable[[list[dict[str, Any]]], object]
) -> None:
    base, path = run
    forge(path, 1, lambda row: change(row["groups"][0]["parameters"]))
    error = refused(base, path, str(path))
    assert "\x1b" not in str(error)


ADAM = {"name": "AdamReplay", "betas": [0.7, 0.9], "horizon": 2, "eps": 1e-8, "bias_correction": True}
POOL = {"name": "GuidingVector", "pool_size": 4, "elite_ratio": 0.5, "weighting": "ranked"}
LOW = {"name": "LowRank", "rank": 2, "refresh_interval": 3, "scale": "paper"}
AGZO = {"name": "ActivationSubspace", "rank": 1, "power_iterations": 3, "mask": None, "balance": "printed"}


@pytest.mark.parametrize(
    ("axis", "member"),
    [
        ("direction", {}),
        ("direction", {"name": "Dense"}),
        ("direction", {"name": "Direction"}),
        ("direction", {"name": "Terms"}),
        ("direction", {"name": "annotations"}),
        ("direction", {"name": "__builtins__"}),
        ("direction", {"name": "SGD", "normalized": False}),
        ("direction", {"name": ["Gaussian"]}),
        ("direction", {"name": "Gaussian", "rank": 2}),
        ("direction", LOW | {"rank": 2**62}),
        ("direction", LOW | {"rank": 0}),
        ("direction", LOW | {"rank": "2"}),
        ("direction", LOW | {"refresh_interval": 0}),
        ("direction", LOW | {"scale": []}),
        ("direction", {"name": "LowRank"}),
        ("direction", AGZO),
        ("direction", AGZO | {"rank": 10**9}),
        ("direction", AGZO | {"mask": ["x"]}),
        ("direction", AGZO | {"mask": "x" * 10**5}),
        ("estimator", {"name": "CentralDifference", "samples": -1}),
        ("estimator", {"name": "CentralDifference", "samples": 1e300}),
        ("estimator", POOL | {"elite_ratio": 10**999}),
        ("estimator", POOL | {"pool_size": 10**999}),
        ("estimator", POOL | {"weighting": {}}),
        ("update", ADAM | {"eps": 10**999}),
        ("update", ADAM | {"eps": 1e300}),
        ("update", ADAM | {"betas": [0.7, 10**999]}),
        ("update", ADAM | {"betas": {"a": 1}}),
        ("update", ADAM | {"horizon": 1.5}),
        ("update", {"name": "SGD"}),
        ("update", None),
        ("update", "SGD"),
    ],
)
def test_axes_that_there_are_not(run: tuple[nn.Module, Path], axis: str, member: object) -> None:
    base, path = run
    forge(path, 1, lambda row: row["recipe"].update({axis: member}))
    refused(base, path, str(path))


@pytest.mark.parametrize("horizon", [2**62, 10**999])
def test_a_window_longer_than_the_run_costs_nothing(run: tuple[nn.Module, Path], horizon: int) -> None:
    base, path = run
    forge(path, 1, lambda row: row["recipe"].update(update=ADAM | {"horizon": horizon}))
    zoext.replay(base, path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"step":1', '"step":' + "9" * 5000),
        ('"step":1', '"step":1e999999999'),
        ('"step":1', '"step":1.0'),
        ('"finite":true', '"finite":NaN'),
        ('"finite":true', '"finite":-Infinity'),
        ('"finite":true', '"finite":true,"loss":1e999'),
        ('"finite":true', '"finite":true,"x":' + "[" * 100_000 + "]" * 100_000),
        ('"finite":true', '"finite":' + "[" * 900 + "]" * 900),
        ('"finite":true', '"finite":' + "[" * 400 + "]" * 400),
        ('"finite":true', '"finite":' + '{"a":' * 400 + "1" + "}" * 400),
        ('"finite":true', '"finite":' + '{"a":' * 100_000 + "1" + "}" * 100_000),
        ('"finite":true', '"finite":true "x"'),
        ('"finite":true', '"finite":"\\ud800"'),
        ('"finite":true', '"finite":"\x00\x01"'),
        ('{"step":1', '{"step":1,}'),
        ('{"step":1', "{'step':1"),
        ('{"step":1', "{"),
    ],
)
def test_text_that_is_hostile(run: tuple[nn.Module, Path], old: str, new: str) -> None:
    base, path = run
    forge_text(path, 2, old, new)
    refused(base, path, f"{path}: line 2")


@pytest.mark.parametrize(
    "body", [b'{"a":"\xff\xfe"}', b"{\x00}", b'{"a":1}'.decode().encode("utf-16-le"), b"{}}"]
)
def test_bytes_that_are_no_text(run: tuple[nn.Module, Path], body: bytes) -> None:
    base, path = run
    bodies = [json.dumps(record).encode() for record in records(path)]
    write_bodies(path, [*bodies[:2], body, *bodies[3:]])
    refused(base, path, f"{path}: line 3")


@pytest.mark.parametrize("inside", [b"x", b"[],"])
def test_long_lines_cost_little(run: tuple[nn.Module, Path], inside: bytes) -> None:
    """100 MB as one string, and what takes most memory in the longest line that is read."""
    base, path = run
    bodies = [json.dumps(record).encode() for record in records(path)]
    size = 100_000_000 if inside == b"x" else lines.LONGEST - 100
    content = inside * (size // len(inside))
    value = b'"' + content + b'"' if inside == b"x" else b"[" + content + b"0]"
    write_bodies(path, [*bodies[:2], b'{"step":2,"lr":' + value + b"}"])
    del bodies, content, value
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(TrajectoryError, match="line 3"):
        zoext.replay(base, path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 20
    assert after.ru_maxrss - before.ru_maxrss < 2**20  # KiB


def test_what_is_written_is_short_enough_to_be_read(tmp_path: Path) -> None:
    run = FaultyRun("mezo")
    path = tmp_path / "run.jsonl"
    with pytest.raises(ValueError, match="at most 16777216 bytes"):
        zoext.Trajectory(path, run.optimizer, notes={"text": "x" * lines.LONGEST})
    assert not path.exists()
    assert run.optimizer.recorder is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", [1e308]),
        ("lr", [-1e308]),
        ("weight_decay", [1e308]),
        ("mu", [5e-324]),
        ("mu", [1e308]),
        ("coefficients", [3e38, -3e38]),
    ],
)
@pytest.mark.parametrize("recipe", ["mezo", "adamezo"])
def test_numbers_that_are_absurd_but_possible(
    recipe: str, field: str, value: list[float], tmp_path: Path
) -> None:
    """They may ruin the weights, as they would have in the run; they end no replay."""
    path = tmp_path / "run.jsonl"
    base, _ = record(path, recipe=recipe)
    size = len(records(path)[1][field])
    forge(path, 2, lambda row: row.update({field: (value * size)[:size]}))
    assert zoext.replay(base, path).param_groups[0]["step"] == 4


def test_steps_without_terms(tmp_path: Path) -> None:
    for recipe in ("mezo", "adamezo", "lozo", "gv"):
        path = tmp_path / f"{recipe}.jsonl"
        base, _ = record(path, recipe=recipe)
        for line in (2, 4):
            forge(path, line, lambda row: row.update(seeds=[], coefficients=[]))
        assert zoext.replay(base, path).param_groups[0]["step"] == 4


def test_parameters_that_cannot_be_moved(run: tuple[nn.Module, Path]) -> None:
    base, path = run
    turned = copy.deepcopy(base)
    turned[3].weight.data = turned[3].weight.data.t().contiguous().t()
    refused(turned, path, "3.weight is not contiguous")
    integers = copy.deepcopy(base)
    integers[3].bias = nn.Parameter(torch.arange(3), requires_grad=False)
    digest = zoext.digest.digest(integers[3].bias)
    forge(
        path,
        1,
        lambda row: row["groups"][0]["parameters"][-1].update(dtype="torch.int64", digest=digest),
    )
    refused(integers, path, "3.bias", "int64")


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
        refused(base, path, f"{beside}: damaged at byte ")
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
        (lambda offset: [offset, 0, 0], "damaged"),
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
    forge(path, 1, lambda row: row["recipe"].update(direction=LOW))
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
        row["frame"] = [end, len(document), zoext.trajectory.frames.zlib.crc32(document)]
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
    refused(base, path, f"{beside}: damaged at byte ")


# Going on


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


def test_only_the_run_itself_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    _, run = record(path, recipe="lozo")
    data = path.read_bytes()
    for recipe, options in [("mezo", {}), ("lozo", {"seed": 1}), ("lozo", {"precision": "nearest"})]:
        with pytest.raises(TrajectoryError, match="is of another run"):
            zoext.Trajectory(path, FaultyRun(recipe, **options).optimizer, resume=True)
    with pytest.raises(TrajectoryError, match="is of another model"):
        zoext.Trajectory(path, FaultyRun("lozo", torch.bfloat16).optimizer, resume=True)
    assert path.read_bytes() == data
    with zoext.Trajectory(path, run.optimizer, resume=True):
        run.step()


def test_a_side_file_that_is_missing_or_damaged_is_not_gone_on_with(tmp_path: Path) -> None:
    path, beside = tmp_path / "run.jsonl", tmp_path / "run.frames"
    _, run = record(path, recipe="agzo")
    lines, data = path.read_bytes(), beside.read_bytes()
    for damaged, how in ((data[:-1], "is too short"), (b"\x01" + data[1:], "damaged at byte 0")):
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
