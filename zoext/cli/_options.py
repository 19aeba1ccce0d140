"""Command-line options that ``zoext finetune`` and ``zoext compare`` share, and the types of their values."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from zoext import ops
from zoext.cli import _config
from zoext.cli._errors import UserError
from zoext.cli._ranks import PARALLELS, Ranks
from zoext.cli._schedules import SHAPES
from zoext.cli._settings import (
    DTYPES,
    KINDS_OF_DATA,
    LORA_LR,
    PROBES,
    TASKS,
    AddArguments,
    CommonSettings,
)
from zoext.tasks import PRESETS, TRAINS, Template

_Number = TypeVar("_Number", int, float)


class _Group(Protocol):
    """A parser or a group of its options."""

    def add_argument(self, *names: str, **options: Any) -> object: ...


def _number(
    kind: Callable[[str], _Number], wanted: str, accepts: Callable[[_Number], bool]
) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
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


def positive_or(word: str) -> Callable[[str], float | str]:
    """The type of a positive number, or of ``word`` in its place."""

    def parse(text: str) -> float | str:
        return word if text == word else positive(text)

    return parse


fraction = _number(float, "between 0 and 1", lambda value: 0 < value < 1)
share = _number(float, "between 0 and 1, or one of them", lambda value: 0 <= value <= 1)
count = _number(int, "an integer of at least 1", lambda value: value >= 1)
whole = _number(int, "an integer of at least 0", lambda value: value >= 0)
seed = _number(int, "an integer of 64 bits", lambda value: -(2**63) <= value < 2**64)


def named_values(text: str) -> dict[str, str]:
    """The type of ``NAME=VALUE,...``, or of a JSON object: the values by name, as text."""
    if text.startswith("{"):
        try:
            return {name: str(value) for name, value in json.loads(text).items()}
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be NAME=VALUE,... or a JSON object: {error}") from None
    pairs = [part.partition("=") for part in text.split(",")]
    names = [name for name, _, _ in pairs]
    if not all(name and equals and value for name, equals, value in pairs) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE,... with each name once, not {text}")
    return {name: value for name, _, value in pairs}


def template(text: str) -> str:
    """The type of a template: shells pass \\n as two characters."""
    text = text.replace("\\n", "\n").replace("\\t", "\t")
    try:
        return Template(text).text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Defaults:
    """The values of options that are not given: in general, and in the demo."""

    general: CommonSettings
    demo: CommonSettings

    def add(
        self,
        group: _Group,
        option: str,
        kind: Callable[[str], object],
        metavar: str,
        text: str,
    ) -> None:
        """Adds ``--option``, a number whose help names its defaults."""
        field = option.replace("-", "_")
        general, in_demo = getattr(self.general, field), getattr(self.demo, field)
        default = f"{general:g}" if general == in_demo else f"{general:g} [{in_demo:g}]"
        group.add_argument(f"--{option}", type=kind, metavar=metavar, help=f"{text} (default {default})")


def add_task(parser: argparse.ArgumentParser, defaults: Defaults) -> _Group:
    """Adds the options for model, data and trainable parameters; returns their group."""
    group = parser.add_argument_group("model and data")
    general = defaults.general
    group.add_argument("--model", metavar="M", help="a folder, or a name on the hub (default: the demo's)")
    group.add_argument(
        "--data", metavar="D", help="a file, a folder, or a name on the hub (default: the demo's)"
    )
    group.add_argument("--valid-data", metavar="D", help="held-out examples, in any of the same forms")
    defaults.add(
        group, "validation-fraction", fraction, "F", "share of the data to hold out if it has no such part"
    )
    group.add_argument(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=f"{', '.join(KINDS_OF_DATA)}, or a task of the MeZO study: {', '.join(PRESETS)} "
        "(default: by the columns of the data and the head of the model)",
    )
    group.add_argument(
        "--template",
        type=template,
        metavar="TEXT",
        help="the prompt, with columns in braces, as 'Review: {text}\\nSentiment:'; \\n is a new line, and "
        "{mask} what a masked model fills in",
    )
    group.add_argument(
        "--label-words",
        type=named_values,
        metavar="LABEL=WORD,...",
        help="the answer that stands for each label (default: the labels themselves)",
    )
    group.add_argument(
        "--text-column", metavar="NAME[,NAME]", help="the column with the text, or the two of a pair of texts"
    )
    group.add_argument("--label-column", metavar="NAME", help="the column with the label")
    group.add_argument(
        "--loss",
        choices=TRAINS,
        help="what is trained with candidate answers: the choice among them, or the answer as text "
        f"(default {general.loss})",
    )
    defaults.add(group, "max-length", count, "N", "tokens; longer texts are truncated")
    defaults.add(group, "max-new-tokens", count, "N", "tokens of an answer that is generated")
    group.add_argument(
        "--trainable",
        metavar="PATTERN",
        help="train the parameters whose names match this regular expression "
        "(default all; a demo trains some)",
    )
    return group


def add_threads(group: _Group) -> None:
    """Adds the option for the number of threads."""
    group.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="processor threads (default: OMP_NUM_THREADS, or one per core)",
    )


def add_step(group: _Group, defaults: Defaults) -> None:
    """Adds the options of a step other than its learning rate."""
    group.add_argument(
        "--lora",
        type=count,
        metavar="RANK",
        help="train LoRA adapters (PEFT) of this rank in all linear layers, in place of the weights; the "
        f"default lr is then {LORA_LR:g} times as large",
    )
    defaults.add(group, "mu", positive, "X", "scale of the perturbation")
    group.add_argument(
        "--mu-schedule",
        choices=SHAPES,
        help=f"how mu changes during a run (default {defaults.general.mu_schedule})",
    )
    defaults.add(group, "mu-end", fraction, "F", "where its schedule ends, as a fraction of mu")
    defaults.add(group, "weight-decay", nonnegative, "X", "decoupled weight decay")
    defaults.add(group, "batch-size", count, "N", "examples per step")
    defaults.add(
        group, "gradient-accumulation", count, "N", "pieces that a batch is evaluated in, to save memory"
    )
    general = defaults.general
    group.add_argument("--dtype", choices=DTYPES, help=f"of the weights (default {general.dtype})")
    group.add_argument("--probe", choices=PROBES, help=f"how weights are perturbed (default {general.probe})")
    group.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add_threads(group)
    group.add_argument(
        "--parallel",
        choices=PARALLELS,
        help="what several processes divide: the examples of a batch, or the probes of a round "
        f"(default {general.parallel})",
    )


def add_machine(group: _Group, defaults: Defaults) -> None:
    """Adds the options that say how a model is evaluated, without any step."""
    group.add_argument(
        "--batch-size", type=count, metavar="N", help="examples that are evaluated at once (default 16)"
    )
    group.add_argument(
        "--dtype", choices=DTYPES, help=f"of the weights (default {defaults.general.dtype}, or the run's)"
    )
    group.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add_threads(group)


def add_lr_schedule(group: _Group, defaults: Defaults, unit: str) -> None:
    """Adds the options for the ends of a learning rate schedule; a warm-up is in units of ``unit``."""
    defaults.add(group, "warmup", whole, "N", f"{unit} during which lr rises linearly from 0")
    defaults.add(group, "lr-end", share, "F", "where its schedule ends, as a fraction of lr")


def add_output(group: _Group, out: str, resume: str) -> None:
    """Adds the options for the output folder and the run that may already be in it."""
    group.add_argument("--out", type=Path, metavar="DIR", help=f"default: {out}, the next free N")
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings as TOML, such as the config.toml of a run; options on the command line go before",
    )
    group.add_argument("--resume", action="store_true", help=f"continue the run in --out, {resume}")
    group.add_argument("--overwrite", action="store_true", help="delete the run in --out and start a new one")
    group.add_argument("--quiet", action="store_true", help="print only errors and how to resume")
    add_json(group)


def add_json(group: _Group) -> None:
    """Adds the option for programs that read what a command prints."""
    group.add_argument(
        "--json", action="store_true", help="print one JSON object about the result, and else only errors"
    )


@dataclass(frozen=True)
class Request:
    """The options of ``add_output`` and ``--demo``, and all others, the settings ``given``, by name.

    With ``json``, a request is ``quiet`` too.
    """

    given: dict[str, Any]
    out: Path | None = None
    demo: str | None = None
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False
    json: bool = False

    @classmethod
    def of(cls, arguments: argparse.Namespace, add_arguments: AddArguments) -> Request:
        """The request of a command line, completed by the file that ``--config`` names.

        Raises:
            UserError: for options that exclude each other, or a file that cannot be used.
        """
        given = vars(arguments).copy()
        if (file := given.pop("config", None)) is not None:
            given = {**_config.read(file, add_arguments), **given}
        names = [field.name for field in dataclasses.fields(cls)]
        request = cls(**{name: given.pop(name) for name in names if name in given}, given=given)
        request = dataclasses.replace(request, quiet=request.quiet or request.json)
        if request.resume and request.out is None:
            raise UserError("--resume needs --out DIR")
        if request.resume and request.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if request.demo is not None and not request.is_demo:
            raise UserError(f"--demo {request.demo}: has its own model, data and task; leave out yours")
        return request

    @property
    def is_demo(self) -> bool:
        return not {"model", "data", "task"} & self.given.keys()


def choose_device(name: str | None, ranks: Ranks) -> torch.device:
    """The device called ``name``; by default a GPU if there is one that zoext has kernels for.

    Each of several ranks of a machine gets a GPU of its own.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() and ops.cuda_missing is None else "cpu"
    device = _checked_device(name)
    if device.type == "cpu" or ranks.count == 1:
        return device
    if device.index is not None:
        raise UserError(f"--device {name}: each of {ranks.count} processes needs a GPU; give --device cuda")
    if ranks.local >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: each process needs a GPU, and there are {torch.cuda.device_count()} here; "
            "start as many processes, or give --device cpu"
        )
    device = torch.device("cuda", ranks.local)
    torch.cuda.set_device(device)  # before the first collective
    return device


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; give cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {name}: zoext has kernels for cpu and cuda only")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no CUDA device; give --device cpu")
    if ops.cuda_missing is not None:
        raise UserError(
            f"--device {name}: zoext's CUDA kernels: {ops.cuda_missing}; build them or give --device cpu"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices")
    return device
