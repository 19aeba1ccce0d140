"""The options of ``zoext finetune``."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from zoext.cli import demo
from zoext.cli.optimizers import OPTIMIZERS
from zoext.cli.settings import DTYPES, PROBES, TASKS, Settings

Number = TypeVar("Number", int, float)


def _number(
    kind: Callable[[str], Number], wanted: str, accepts: Callable[[Number], bool]
) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}") from None
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    return parse


positive = _number(float, "finite and > 0", lambda value: math.isfinite(value) and value > 0)
nonnegative = _number(float, "finite and >= 0", lambda value: math.isfinite(value) and value >= 0)
fraction = _number(float, "between 0 and 1", lambda value: 0 < value < 1)
count = _number(int, "an integer of at least 1", lambda value: value >= 1)
seed = _number(int, "an integer of 64 bits", lambda value: -(2**63) <= value < 2**64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; one that is not given is not in the namespace."""
    parser.argument_default = argparse.SUPPRESS
    what = parser.add_argument_group("what to learn")
    what.add_argument("--model", metavar="M", help="a folder, or a name on the hub (default: the demo's)")
    what.add_argument(
        "--data", metavar="D", help="a file, a folder, or a name on the hub (default: the demo's)"
    )
    what.add_argument("--valid-data", metavar="D", help="held-out examples, in any of the same forms")
    _add(what, "validation-fraction", fraction, "F", "held out of the data where it has no such part")
    what.add_argument("--task", choices=TASKS, help="default: classification if there are labels")
    _add(what, "max-length", count, "N", "tokens; longer texts are cut")
    what.add_argument(
        "--trainable",
        metavar="PATTERN",
        help="regular expression; parameters whose name matches move (default all [all but embeddings])",
    )
    how = parser.add_argument_group("how to learn", "defaults, and in brackets those of the demo")
    how.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help=f"default {Settings.optimizer}")
    _add(how, "lr", positive, "X", "learning rate")
    _add(how, "mu", positive, "X", "scale of the displacement")
    _add(how, "weight-decay", nonnegative, "X", "decoupled")
    _add(how, "steps", count, "N", "optimizer steps")
    _add(how, "batch-size", count, "N", "examples a step")
    _add(how, "seed", seed, "N", "determines the whole run")
    how.add_argument("--dtype", choices=DTYPES, help=f"of the weights (default {Settings.dtype})")
    how.add_argument("--probe", choices=PROBES, help=f"how weights are displaced (default {Settings.probe})")
    how.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    run = parser.add_argument_group("the run")
    _add(run, "eval-every", count, "N", "steps between evaluations")
    _add(run, "checkpoint-every", count, "N", "steps between checkpoints")
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/demo-N or runs/finetune-N, the next free N"
    )
    run.add_argument("--resume", action="store_true", help="go on with the run in --out, bit for bit")
    run.add_argument("--overwrite", action="store_true", help="remove the run in --out and start a new one")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors and how to resume")


def parse_settings(record: dict[str, Any]) -> Settings:
    """Settings from the fields that a file holds, checked as if they were given as options.

    Raises:
        ValueError: for a field that is absent, unknown, of another type or out of range.
    """
    usual = dataclasses.asdict(Settings())
    if not isinstance(record, dict) or record.keys() != usual.keys():
        different = sorted(usual.keys() ^ record.keys()) if isinstance(record, dict) else ["not an object"]
        raise ValueError(f"settings: {', '.join(different)}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    given = {name: value for name, value in record.items() if value is not None or usual[name] is not None}
    for name, value in given.items():
        wanted = type(usual[name]) if usual[name] is not None else str
        if type(value) is not wanted:
            raise ValueError(f"{name} is {value!r}")
    try:
        parsed = parser.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in given.items()])
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    return Settings(**vars(parsed))


def _add(
    group: argparse._ArgumentGroup, option: str, kind: Callable[[str], float], metavar: str, text: str
) -> None:
    field = option.replace("-", "_")
    usual, in_demo = getattr(Settings, field), getattr(demo.SETTINGS, field)
    default = f"{usual:g}" if usual == in_demo else f"{usual:g} [{in_demo:g}]"
    group.add_argument(f"--{option}", type=kind, metavar=metavar, help=f"{text} (default {default})")
