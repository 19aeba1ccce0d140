"""LoRA adapters of PEFT: added to a model, loaded from a folder, and saved as PEFT expects them.

A folder of an adapter has the configuration of the adapted model beside the files of PEFT, so that it says
which head and which classes the model has.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from zoext.cli._errors import UserError, require
from zoext.cli._problem.digests import digest_of

_CONFIG = "adapter_config.json"
_ALPHA = 2  # times the rank: the outputs of adapters are scaled by alpha / rank

#: How PEFT calls the heads; those of classifiers are trained beside the adapters.
_TASKS = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM"}


def is_adapter(name: str) -> bool:
    """Whether ``name`` is the folder of an adapter."""
    return (Path(name) / _CONFIG).is_file()


def base_of(name: str) -> str:
    """The model that ``name`` adapts, or ``name`` itself if it is no adapter.

    Raises:
        UserError: for an adapter that does not say which.
    """
    if not is_adapter(name):
        return name
    try:
        config = json.loads((Path(name) / _CONFIG).read_text(encoding="utf-8"))
        base, task = config["base_model_name_or_path"], config.get("task_type")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        base = task = None
    if not isinstance(base, str) or not base:
        raise UserError(f"model {name}: {_CONFIG} does not name the base model; write it there")
    if task == "SEQ_CLS" and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"model {name}: is the adapter of a classifier, and does not say what its outputs mean; save the "
            "configuration of the adapted model there, with id2label"
        )
    if Path(base).is_absolute() and not Path(base).exists():
        raise UserError(
            f"model {name}: its base model {base} is not there; write in {_CONFIG} of it where it is now"
        )
    return base


def is_adapted(model: nn.Module) -> bool:
    """Whether ``model`` has adapters of PEFT."""
    return hasattr(model, "peft_config")


def adapted(model: Any, name: str, rank: int | None, head: str) -> Any:
    """The model with the adapters that it is to have.

    Args:
        model: the base model, with its head.
        name: where it is from: a folder, a name on the hub or a GGUF file, or the folder of its adapter.
        rank: of new adapters in all linear layers, whose weights are drawn from torch's generator, or of
            those in the folder, which are trained on; None merges the latter into the weights.
        head: what the last layer predicts.

    Raises:
        UserError: if PEFT is not installed, or the adapters have another rank.
    """
    if not is_adapter(name):
        return model if rank is None else _with_new(model, name, rank, head)
    peft = _peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = peft.PeftModel.from_pretrained(model, name, is_trainable=rank is not None)
    if found.active_peft_config.is_prompt_learning:
        kind = found.active_peft_config.peft_type.value
        raise UserError(f"model {name}: adapters of the type {kind} have no weights to merge or train here")
    if rank is None:
        return found.merge_and_unload()
    if (theirs := getattr(found.peft_config["default"], "r", None)) != rank:
        raise UserError(
            f"--lora {rank}: the adapters in {name} have rank {theirs}; give that rank, or omit --lora to "
            "train the weights that they are merged into"
        )
    return found


def _with_new(model: Any, name: str, rank: int, head: str) -> Any:
    peft = _peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=_ALPHA * rank, target_modules="all-linear", task_type=_TASKS.get(head)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about what PEFT calls in transformers
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # it adapts its settings to the layer
        found = peft.get_peft_model(model, config)
    # A path that holds wherever the adapter is loaded, and an order that does not change with the process.
    config.base_model_name_or_path = str(Path(name).resolve()) if Path(name).exists() else name
    config.target_modules = sorted(config.target_modules)
    return found


def digest_of_base(model: nn.Module) -> str:
    """A hash of the weights that do not move: those of the base model."""
    return digest_of((name, each) for name, each in model.named_parameters() if not each.requires_grad)


def save(model: Any, folder: Path) -> None:
    """Writes the adapters for PeftModel.from_pretrained, and the configuration of the adapted model."""
    # By default, PEFT may ask the hub whether the vocabulary of the base has changed.
    model.save_pretrained(folder, save_embedding_layers=False)
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.save_pretrained(folder)


def _peft() -> Any:
    require(("peft",), "peft")
    return importlib.import_module("peft")
