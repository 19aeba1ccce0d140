"""Loads models and tokenizers of transformers, from a folder or the hub."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zoext.cli.base import Base
from zoext.cli.data import Label, first_line
from zoext.cli.errors import UserError


def classes_of(name: str, labels: Collection[Label]) -> tuple[str, ...]:
    """The names of the classes that ``labels`` are of, in the order of the outputs of the model ``name``.

    A model that already tells these classes apart keeps its head; another one gets a new head.
    """
    transformers = _transformers()
    with _loading(name):
        config = transformers.AutoConfig.from_pretrained(name)
        return tuple(_classes(config, labels))


def load(name: str, base: Base) -> tuple[Any, Any]:
    """The model ``name`` with the head that ``base`` asks for, and its tokenizer."""
    transformers = _transformers()
    with _loading(name), _new_weights_from(base.seed):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        _ensure_padding(tokenizer)
        model = _AUTO[base.task](transformers, name, base)
    if base.task == "classification":
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _classifier(transformers: Any, name: str, base: Base) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        name,
        dtype=getattr(torch, base.dtype),
        id2label=dict(enumerate(base.classes)),
        label2id={label: index for index, label in enumerate(base.classes)},
        ignore_mismatched_sizes=True,
    )


def _causal(transformers: Any, name: str, base: Base) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, base.dtype))


_AUTO = {"classification": _classifier, "causal-lm": _causal}


def load_own(name: str, dtype: torch.dtype) -> tuple[Any, Any | None]:
    """The model ``name`` as its configuration names it, and its tokenizer if it has one."""
    transformers = _transformers()
    with _loading(name), _new_weights_from(0):
        config = transformers.AutoConfig.from_pretrained(name)
        architecture: Any = getattr(transformers, (config.architectures or ["none"])[0], None)
        is_one = isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
        if not is_one:
            raise ValueError(f"its config.json names no architecture of transformers: {config.architectures}")
        model = architecture.from_pretrained(name, dtype=dtype)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError):
            tokenizer = None
    return model.eval(), tokenizer


def encode(tokenizer: Any, texts: Iterable[str], **options: Any) -> Any:
    """What ``tokenizer`` makes of ``texts``; it stays as it was loaded.

    One of tokenizers remembers how it last padded and truncated, and would write that into its file.
    """
    return copy.deepcopy(tokenizer)(list(texts), **options)


def _transformers() -> Any:
    # Imported late, since it takes seconds, and as Any, since it is typed in parts only.
    return importlib.import_module("transformers")


def _classes(config: Any, labels: Collection[Label]) -> list[str]:
    """The names of the classes in the order of the model's outputs."""
    if any("ForSequenceClassification" in name for name in config.architectures or ()):
        known = [str(config.id2label[index]) for index in range(config.num_labels)]
        if sorted({str(label) for label in labels}) == sorted(known):  # and so no name is there twice
            return known
        if all(isinstance(label, int) and 0 <= label < len(known) for label in labels):
            return [str(index) for index in range(len(known))]
    numbers = sorted(label for label in labels if isinstance(label, int))
    return [str(label) for label in [*numbers, *sorted(str(x) for x in labels if not isinstance(x, int))]]


def _ensure_padding(tokenizer: Any) -> None:
    # The attention mask and the labels leave padding out, so that any token serves.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


@contextmanager
def _loading(name: str) -> Iterator[None]:
    with quiet_transformers():
        try:
            yield
        except Exception as error:  # a file, a network, a parser: whatever it is, it is about this name
            raise UserError(f"model {name}: cannot be loaded: {first_line(error)}") from None


@contextmanager
def _new_weights_from(seed: int) -> Iterator[None]:
    """Weights that are drawn come from ``seed``, and torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and load reports, whose place is taken by errors of our own."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def choose_trainable(model: nn.Module, pattern: str) -> None:
    """Only floating-point parameters whose name contains a match of ``pattern`` are to move."""
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"--trainable {pattern!r}: not a regular expression: {error}") from None
    names = [name for name, _ in model.named_parameters()]
    if not any(matches(name) for name in names):
        raise UserError(
            f"--trainable {pattern!r}: matches no parameter; there are {names[0]} ... {names[-1]}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and matches(name) is not None)
