"""Training arguments that choose a zoext optimizer, in Python or on a command line."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainingArguments

from zoext import recipes
from zoext.optimizer import ZerothOrderOptimizer
from zoext.probes import StreamedProbe

if TYPE_CHECKING:
    _Arguments = TrainingArguments
else:
    _Arguments = object

#: The optimizers by name.
RECIPES: dict[str, type[ZerothOrderOptimizer]] = {
    name: member
    for name, member in vars(recipes).items()
    if isinstance(member, type)
    and issubclass(member, ZerothOrderOptimizer)
    and member is not ZerothOrderOptimizer
}
#: Has a plain Trainer refuse the arguments, which would otherwise train with AdamW.
_OPTIM = "zoext (use ZOTrainer, or ZOTrainerMixin before your trainer)"
#: Options of an optimizer that other arguments set.
_ELSEWHERE = {
    "lr": "learning_rate",
    "mu": "zo_mu",
    "weight_decay": "weight_decay",
    "seed": "seed",
    "estimator": "optimizers=(optimizer, None) of the trainer: arguments are saved as JSON",
}


@dataclass
class ZOArgumentsMixin(_Arguments):
    """The arguments of a zoext optimizer, for a subclass of ``TrainingArguments``.

        @dataclass
        class ZOSFTConfig(ZOArgumentsMixin, SFTConfig):
            pass

    ``HfArgumentParser`` makes a command-line option of each:

        --zo_optimizer MeZO --zo_mu 1e-3 --zo_options '{"samples": 4, "precision": "residual"}'

    ``learning_rate``, ``weight_decay`` and ``seed`` are those of ``TrainingArguments``. The arguments of
    first-order optimizers (``optim``, ``adam_beta1``, ``max_grad_norm``, ...) have no effect.

    Args:
        zo_optimizer: the name of an optimizer of zoext: "MeZO" (default), "AdaMeZO", "AGZO", "LOZO", "MeZOGV"
            or "MeZOGreedy".
        zo_mu: scale of the displacement at which losses are evaluated. Default 1e-3.
        zo_options: other options of the optimizer by name, as a dict or as text in JSON.
        zo_compact_loss: whether the loss of a language model makes logits for labelled tokens only, where
            ``zoext.CompactLoss`` takes the model and the loss is the model's own. The losses are the same up
            to rounding. Default True.
        learning_rate: default: that of the optimizer, such as 1e-6 for MeZO. It is orders of magnitude below
            that of a first-order optimizer.
        logging_nan_inf_filter: as in ``TrainingArguments``, but False by default: the optimizer checks losses
            itself, and the filter would make every step wait for the device.

    Raises:
        ValueError: for an unknown optimizer, an option that it does not have, or one that another argument
            sets.
    """

    zo_optimizer: str = field(
        default="MeZO", metadata={"help": f"The optimizer of zoext: {', '.join(RECIPES)}."}
    )
    zo_mu: float = field(
        default=1e-3, metadata={"help": "The scale of the displacement at which losses are evaluated."}
    )
    zo_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Other options of the optimizer, in JSON, such as '{\"samples\": 4}'."},
    )
    zo_compact_loss: bool = field(
        default=True, metadata={"help": "Whether logits are made for labelled tokens only, where possible."}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "The initial learning rate. Default: that of the optimizer."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Whether losses that are not finite are left out of the log; waits for the device."
        },
    )

    def __post_init__(self) -> None:
        if self.zo_optimizer not in RECIPES:
            raise ValueError(f"zo_optimizer must be one of {', '.join(RECIPES)}, not {self.zo_optimizer!r}")
        recipe = RECIPES[self.zo_optimizer]
        self.zo_options = _options(self.zo_options, recipe)
        if self.learning_rate is None:
            self.learning_rate = float(inspect.signature(recipe).parameters["lr"].default)
        if self.optim == _OPTIM:  # of arguments that were built before
            self.optim = TrainingArguments.default_optim
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.optim = _OPTIM


@dataclass
class ZOTrainingArguments(ZOArgumentsMixin, TrainingArguments):
    """``TrainingArguments`` with those of a zoext optimizer; see ``ZOArgumentsMixin``.

    args = ZOTrainingArguments("out", zo_optimizer="MeZO", zo_options={"samples": 4}, learning_rate=1e-6)
    """


def _options(given: dict[str, Any] | str | None, recipe: type[ZerothOrderOptimizer]) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"zo_options must be a dict, or an object in JSON, not {given}: {error}"
            ) from None
    if not isinstance(given, dict | None):
        raise ValueError(f"zo_options must be a dict, or an object in JSON, not {given!r}")
    options = given or {}
    own = [
        name
        for name, parameter in inspect.signature(recipe).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _ELSEWHERE
    ]
    known = (*own, "probe", "nonfinite", "precision")
    for name in options:
        if name in _ELSEWHERE:
            raise ValueError(f"zo_options: give {name} as the argument {_ELSEWHERE[name]}")
        if name not in known:
            raise ValueError(
                f"zo_options: the options of {recipe.__name__} are {', '.join(known)}, not {name!r}"
            )
    return options


def build(
    recipe: type[ZerothOrderOptimizer], model: nn.Module, decayed: list[str], options: dict[str, Any]
) -> ZerothOrderOptimizer:
    """The optimizer of ``model``. Weight decay applies only to the parameters that ``decayed`` names."""
    if not options.get("weight_decay"):
        return recipe(model, **options)
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in named if pair[0] in decayed]},
        {"params": [pair for pair in named if pair[0] not in decayed], "weight_decay": 0.0},
    ]
    if options.get("probe", "auto") in ("auto", "streamed"):
        options = {**options, "probe": StreamedProbe(model)}
    return recipe([group for group in groups if group["params"]], **options)
