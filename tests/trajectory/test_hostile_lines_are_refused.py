"""A trajectory with hostile lines and good checksums raises a TrajectoryError, and nothing changes."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoext
from support.faulty_runs import FaultyRun
from support.trajectory_files import forge, forge_text, record, record_mezo, records, refused, write_bodies
from zoext.trajectory import TrajectoryError
from zoext.trajectory._format import lines
from zoext.trajectory._format.header import digest


@pytest.fixture
def run(tmp_path: Path) -> tuple[nn.Module, Path]:
    return record_mezo(tmp_path / "run.jsonl")


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


def test_moves_that_are_many_times_what_there_is(run: tuple[nn.Module, Path]) -> None:
    """In the order of their text they would be gigabytes."""
    base, path = run
    for moves in ([[0, 6]] * 200_000, [[0, 1], [0, 6]], [[2, 6], [0, 1]], []):
        forge(path, 2, lambda step, moves=moves: step.update(moves=moves))
        refused(base, path, f"{path}: line 2: ", "moves must be ranges in ascending order, at least one")


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
MANY = {"name": "Population", "size": 4, "shaping": "rank", "antithetic": True}
LOW = {"name": "LowRank", "rank": 2, "refresh_interval": 3, "scale": "paper"}
AGZO = {"name": "ActivationSubspace", "rank": 1, "power_iterations": 3, "mask": None, "balance": "paper"}


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
        ("estimator", MANY | {"size": 5}),
        ("estimator", MANY | {"shaping": ["rank"]}),
        ("estimator", MANY | {"antithetic": 1}),
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
@pytest.mark.filterwarnings("ignore:rank=")
def test_axes_that_there_are_not(run: tuple[nn.Module, Path], axis: str, member: object) -> None:
    base, path = run
    forge(path, 1, lambda row: row["recipe"].update({axis: member}))
    refused(base, path, str(path))


def test_a_rank_of_more_than_all_columns_costs_nothing(run: tuple[nn.Module, Path]) -> None:
    base, path = run
    forge(path, 1, lambda row: row["recipe"].update(direction=LOW | {"rank": 2**62}))
    with pytest.warns(UserWarning, match="is more than the columns of some matrices"):
        zoext.replay(base, path)


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
    same = copy.deepcopy(base)
    same[3].weight.data = same[3].weight.data[:1, :1].expand_as(same[3].weight)
    refused(same, path, "3.weight has elements that share memory")
    integers = copy.deepcopy(base)
    integers[3].bias = nn.Parameter(torch.arange(3), requires_grad=False)
    recorded = digest(integers[3].bias)
    forge(
        path,
        1,
        lambda row: row["groups"][0]["parameters"][-1].update(dtype="torch.int64", digest=recorded),
    )
    refused(integers, path, "3.bias", "int64")
