"""Settings of a run, and how they are read back from its folder, so that resuming needs no arguments."""

from __future__ import annotations

import argparse
import json
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from zoext.cli._errors import UserError
from zoext.cli._ranks import DATA
from zoext.tasks import PRESETS

#: The heads of models: what their last layer predicts.
HEADS = ("classification", "causal-lm", "masked-lm", "seq2seq-lm")
#: Kinds of data that ``--task`` names, beside the presets of ``zoext.tasks``.
KINDS_OF_DATA = (
    "classification",
    "label-words",
    "causal-lm",
    "completion",
    "chat",
    "multiple-choice",
    "generation",
)
TASKS = (*KINDS_OF_DATA, *PRESETS)
DTYPES = ("float32", "bfloat16", "float16")
PROBES = ("auto", "streamed", "inplace", "batched")
PRECISIONS = ("nearest", "stochastic", "residual")
CHECKPOINTS = ("weights", "trajectory")
KEPT = ("last", "best")
#: The lr of adapters, as a multiple of that of weights.
LORA_LR = 100.0

AddArguments = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class CommonSettings:
    """The settings that ``zoext finetune`` and ``zoext compare`` share. Without model and data: the demo."""

    model: str | None = None
    data: str | None = None
    valid_data: str | None = None
    validation_fraction: float = 0.1
    task: str | None = None
    template: str | None = None
    label_words: dict[str, str] = field(default_factory=dict)
    text_column: str | None = None
    label_column: str | None = None
    loss: str = "choice"
    max_length: int = 256
    max_new_tokens: int = 50
    trainable: str = ""
    lora: int | None = None
    lr: float = 1e-6
    lr_end: float = 0.0
    warmup: int = 0
    mu: float = 1e-3
    mu_schedule: str = "constant"
    mu_end: float = 0.1
    weight_decay: float = 0.0
    batch_size: int = 16
    gradient_accumulation: int = 1
    dtype: str = "float32"
    probe: str = "auto"
    device: str | None = None
    threads: int | None = None
    parallel: str = DATA

    @property
    def is_demo(self) -> bool:
        return self.model is None and self.data is None and self.task is None

    @property
    def at_once(self) -> int:
        """The number of examples that are evaluated at once."""
        return math.ceil(self.batch_size / self.gradient_accumulation)

    def check_accumulation(self) -> None:
        """Raises a UserError for more pieces than examples."""
        if self.gradient_accumulation > self.batch_size:
            raise UserError(
                f"--gradient-accumulation {self.gradient_accumulation}: more pieces than the "
                f"{self.batch_size} examples of --batch-size; give as many or fewer"
            )

    def check_adapters(self) -> None:
        """Raises a UserError for adapters in the demo, whose model is made otherwise."""
        if self.lora is not None and self.is_demo:
            raise UserError(f"--lora {self.lora}: the demos train weights; give --model and --data")


@dataclass(frozen=True)
class Settings(CommonSettings):
    """The options of ``zoext finetune`` and their defaults."""

    #: The demo whose model and data are built here. That of the other ones are files, and named as such.
    demo: str | None = None
    optimizer: str = "mezo"
    options: dict[str, str] = field(default_factory=dict)
    schedule: str = "constant"
    steps: int = 1000
    precision: str = "stochastic"
    seed: int = 0
    eval_every: int = 100
    keep: str = "last"
    patience: int | None = None
    checkpoint_every: int = 100
    checkpoint: str = "weights"
    record_frames: bool = False
    log: tuple[str, ...] = ()


SettingsT = TypeVar("SettingsT", bound=CommonSettings)


#: Names in settings of earlier versions, and their present names.
_RENAMED_METHODS = {"agzo-still": "agzo-freeze"}
_RENAMED_BALANCES = {"printed": "paper", "still": "freeze"}


#: Settings that earlier versions did not have, and the values that describe their runs.
_ADDED: dict[str, Any] = {
    "parallel": DATA,
    "threads": None,
    "template": None,
    "label_words": {},
    "text_column": None,
    "label_column": None,
    "loss": "choice",
    "max_new_tokens": 50,
    "lora": None,
    "schedule": "constant",
    "schedules": ["constant"],
    "lr_end": 0.0,
    "warmup": 0,
    "mu_schedule": "constant",
    "mu_end": 0.1,
    "keep": "last",
    "demo": None,
    "patience": None,
    "gradient_accumulation": 1,
    "log": [],
}


class OtherVersionError(ValueError):
    """The stored settings have fields that this version does not write, or lack some; says which."""


def parse(record: Any, kind: type[SettingsT], add_arguments: AddArguments) -> SettingsT:
    """Settings from the fields stored in a JSON file, validated as if they were given as options.

    Raises:
        OtherVersionError: for a missing or unknown field.
        ValueError: for a value of another type or out of range.
    """
    wanted = get_type_hints(kind)
    if not isinstance(record, dict):
        raise ValueError("settings: not an object")
    added = {name: value for name, value in _ADDED.items() if name in wanted}
    record = {**added, **record}
    for what, names in (("lacks", wanted.keys() - record.keys()), ("has", record.keys() - wanted.keys())):
        if names:
            raise OtherVersionError(f"{what} {', '.join(sorted(names))}")
    record = _with_present_names(record)
    for name, value in record.items():
        if type(value) not in _types_in_json(wanted[name]):
            raise ValueError(f"{name} is {value!r}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    given = [
        as_option(f"--{name.replace('_', '-')}", value)
        for name, value in record.items()
        if value is not None and value is not False and value != {}
    ]
    try:
        return kind(**vars(parser.parse_args(given)))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


def _with_present_names(record: dict[str, Any]) -> dict[str, Any]:
    present, options = dict(record), record.get("options")
    if isinstance(method := record.get("optimizer"), str):
        present["optimizer"] = _RENAMED_METHODS.get(method, method)
    if isinstance(options, dict) and isinstance(balance := options.get("balance"), str):
        present["options"] = {**options, "balance": _RENAMED_BALANCES.get(balance, balance)}
    return present


def _types_in_json(hint: Any) -> set[type]:
    alternatives = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    plain = {get_origin(alternative) or alternative for alternative in alternatives}
    return {list if alternative is tuple else alternative for alternative in plain}


def as_option(option: str, value: Any) -> str:
    """``--option=value`` as it is given on the command line, for a value of a file."""
    if value is True:
        return option
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if isinstance(value, dict):
        pairs = [f"{name}={item}" for name, item in value.items()]
        is_plain = not any("," in pair or pair.count("=") > 1 or pair.startswith("{") for pair in pairs)
        value = ",".join(pairs) if is_plain else json.dumps(value)
    return f"{option}={value}"
