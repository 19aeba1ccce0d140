"""Loads models and tokenizers of transformers, from a folder or the hub.

``Base`` is what the files of a model leave open. A run stores it in the header of its trajectory, so that
``zoext replay`` can build the same model.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import io
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoext import tasks
from zoext.cli._errors import UserError
from zoext.cli._problem import adapters
from zoext.cli._problem.data import Label
from zoext.cli._problem.hub import cannot_load
from zoext.cli._settings import DTYPES, HEADS
from zoext.trajectory import Fields, Header

#: The key in the notes of a trajectory.
_NOTE = "zoext finetune"


@dataclass(frozen=True)
class Base:
    """How a run built its initial model, beyond what the files of the model say.

    Attributes:
        demo: whether it is the demo's model.
        task: one of ``HEADS``: what the last layer of the model predicts.
        classes: the names of the classes, in the order of the outputs of a classifier.
        dtype: of the weights.
        seed: of the weights of a new head, and of new adapters.
        lora: the rank of the adapters; None if it has none.
    """

    demo: bool
    task: str
    classes: tuple[str, ...]
    dtype: str
    seed: int
    lora: int | None = None

    def notes(self) -> dict[str, Any]:
        """The notes for the header of a trajectory: plain data."""
        record = {**dataclasses.asdict(self), "classes": list(self.classes)}
        if self.lora is None:  # as earlier versions write it
            del record["lora"]
        return {_NOTE: record}


def base_of(header: Header, where: str) -> Base | None:
    """Reads the Base that ``zoext finetune`` stored in the notes of a trajectory; None if there is none.

    Raises:
        TrajectoryError: for invalid values.
    """
    if _NOTE not in header.notes:
        return None
    fields = Fields(header.notes[_NOTE], f"{where}: notes")
    task, dtype = fields.text("task"), fields.text("dtype")
    for name, value, known in (("task", task, HEADS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise fields.error(f"{name} must be one of {', '.join(known)}, not {value[:20]!r}")
    classes = fields.list_of("classes", lambda name: isinstance(name, str), "names")
    if task == "classification":
        _check_classes(classes, header, fields)
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    lora = _rank(header, fields) if fields.has("lora") else None
    return Base(fields.flag("demo"), task, tuple(classes), dtype, seed, lora)


def _rank(header: Header, fields: Fields) -> int:
    """The rank of adapters, checked before weights of that size are allocated."""
    rank = fields.integer("lora", 1)
    if not any(rank in parameter.shape for parameter in header.parameters):
        raise fields.error(f"lora is {rank}, but no parameter of the run has this size")
    return rank


def _check_classes(classes: list[str], header: Header, fields: Fields) -> None:
    """Bounds the number of outputs before a model of that size is allocated."""
    if len(set(classes)) < len(classes):
        raise fields.error("classes must be distinct names")
    if not any(parameter.shape[:1] == (len(classes),) for parameter in header.parameters):
        raise fields.error(f"classes has {len(classes)} names, but no parameter of the run has as many rows")


def config_of(name: str) -> Any:
    """The configuration of the model ``name``."""
    source = name if (Path(name) / "config.json").is_file() else adapters.base_of(name)
    with _loading(source):
        return _transformers().AutoConfig.from_pretrained(**_files(source))


def kind_of(config: Any, task: str | None) -> str:
    """The kind of the model, see ``zoext.tasks``; without a classification head unless the task has one."""
    return tasks.kind_of(config) if task in (None, "classification") else tasks.language_kind_of(config)


def has_head(config: Any, classes: Collection[str]) -> bool:
    """Whether the model was saved with a classification head for as many classes.

    ``classes_of`` has checked that they are the same.
    """
    return tasks.kind_of(config) == tasks.CLASSIFIER and config.num_labels == len(classes)


def classes_of(config: Any, labels: Collection[Label]) -> tuple[str, ...]:
    """The names of the classes of ``labels``, in the order of the outputs of a classifier with ``config``.

    A model with a head for these classes keeps it; any other gets a new head.
    """
    return tuple(_classes(config, labels))


def load(name: str, base: Base) -> tuple[Any, Any]:
    """The model ``name`` with the head and the adapters that ``base`` describes, and its tokenizer."""
    transformers = _transformers()
    source = adapters.base_of(name)
    with _loading(source), _new_weights_from(base.seed):
        tokenizer = _tokenizer(transformers, name if _has_tokenizer(name) else source)
        _ensure_padding(tokenizer)
        model = _with_head(transformers, source, base)
    if base.task == "classification":
        model.config.pad_token_id = tokenizer.pad_token_id
    with _loading(name), _new_weights_from(base.seed):
        model = adapters.adapted(model, name, base.lora, base.task)
    return model.eval(), tokenizer


def save(model: Any, tokenizer: Any | None, folder: Path) -> None:
    """Writes a model, or its adapters, and its tokenizer if it has one, for ``from_pretrained``."""
    if adapters.is_adapted(model):
        adapters.save(model, folder)
    else:
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _tokenizer(transformers: Any, name: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(**_files(name))
    except (OSError, ValueError, KeyError, TypeError):
        if not Path(name).is_dir() or _has_tokenizer(name):
            raise
        raise UserError(
            f"model {name}: has no tokenizer; save the one that it was trained with there, with "
            "tokenizer.save_pretrained"
        ) from None


def _has_tokenizer(name: str) -> bool:
    return any(any(Path(name).glob(pattern)) for pattern in ("*token*", "*vocab*"))


def _with_head(transformers: Any, name: str, base: Base) -> Any:
    """The model with the head that ``base`` names: a new one for classes, that of its files for tokens."""
    options: dict[str, Any] = {"dtype": getattr(torch, base.dtype), "output_loading_info": True}
    if base.task == "classification":
        options["id2label"] = dict(enumerate(base.classes))
        options["label2id"] = {label: index for index, label in enumerate(base.classes)}
        options["ignore_mismatched_sizes"] = True
    if name.endswith(_GGUF):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    auto = getattr(transformers, _AUTO[base.task])
    with _without_bars(name):
        model, info = auto.from_pretrained(**_files(name), **options)
    missing = sorted(info["missing_keys"])
    if base.task != "classification" and missing:
        raise UserError(
            f"model {name}: its files lack {missing[0]}, so it predicts no tokens; give a language model, or "
            "--task classification"
        )
    # The weights are plain now, and are saved so; some versions leave the mark of packed ones.
    if name.endswith(_GGUF) and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def require_gguf() -> None:
    """Raises a UserError without the packages with which transformers reads GGUF files."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}")


def _without_bars(name: str) -> AbstractContextManager[Any]:
    """Hides the bar of transformers for GGUF files, which heeds none of its settings."""
    return redirect_stderr(io.StringIO()) if name.endswith(_GGUF) else nullcontext()


def _files(name: str) -> dict[str, Any]:
    """The arguments of from_pretrained for a folder, a name on the hub or a GGUF file."""
    if not name.endswith(_GGUF):
        return {"pretrained_model_name_or_path": name}
    require_gguf()
    path = Path(name)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


_GGUF = ".gguf"
_AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def load_own(name: str, dtype: torch.dtype) -> tuple[Any, Any | None]:
    """The model ``name`` with the architecture in its configuration, and its tokenizer if it has one."""
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
    """Tokenises ``texts`` with a copy of ``tokenizer``.

    A fast tokenizer stores its last padding and truncation and would save them with its files.
    """
    return copy.deepcopy(tokenizer)(list(texts), **options)


def _transformers() -> Any:
    # Imported late because it takes seconds, and as Any because it is only partly typed.
    return importlib.import_module("transformers")


def _classes(config: Any, labels: Collection[Label]) -> list[str]:
    """The names of the classes in the order of the model's outputs."""
    if any("ForSequenceClassification" in name for name in config.architectures or ()):
        known = [str(config.id2label[index]) for index in range(config.num_labels)]
        ours = {str(label).lower(): str(label) for label in labels}
        if sorted(ours) == sorted(name.lower() for name in known):  # which also excludes duplicates
            return [ours[name.lower()] for name in known]
        if all(isinstance(label, int) and 0 <= label < len(known) for label in labels):
            return [str(index) for index in range(len(known))]
        if len(labels) == len(known) and not all(re.fullmatch(r"LABEL_\d+", name) for name in known):
            raise UserError(
                f"the labels are {', '.join(sorted(ours.values()))}, and the classification head of the "
                f"model has the classes {', '.join(known)}; call the labels as the head does"
            )
    numbers = sorted(label for label in labels if isinstance(label, int))
    return [str(label) for label in [*numbers, *sorted(str(x) for x in labels if not isinstance(x, int))]]


def _ensure_padding(tokenizer: Any) -> None:
    # Any token will do: the attention mask and the labels exclude padding.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


@contextmanager
def _loading(name: str) -> Iterator[None]:
    with quiet_transformers():
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # raised by a file, the network or a parser
            raise cannot_load("model", "model", name, error) from error


@contextmanager
def _new_weights_from(seed: int) -> Iterator[None]:
    """Seeds newly initialised weights without touching torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the progress bars and load reports of transformers; our own errors replace them."""
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
    """Makes exactly the floating-point parameters whose names match ``pattern`` require grad.

    Of a model with adapters, only those that its adapters train.
    """
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"--trainable {pattern!r}: not a regular expression: {error}") from None
    is_adapted = adapters.is_adapted(model)
    choice = {name: each for name, each in model.named_parameters() if each.requires_grad or not is_adapted}
    if not any(matches(name) for name in choice):
        names, whose = list(choice), " of the adapters" if is_adapted else ""
        raise UserError(
            f"--trainable {pattern!r}: matches no parameter{whose}; there are {names[0]} ... {names[-1]}"
        )
    for name, parameter in choice.items():
        parameter.requires_grad_(parameter.is_floating_point() and matches(name) is not None)
