"""Evaluates a model: its loss, and the share of right answers, on held-out examples.

RUN is the folder of a run of zoext finetune, whose model is evaluated on the examples that the run held
out, or on the rows of --data. Without RUN, --model and --data name a model and its examples, as for zoext
finetune; for example a language model before any training.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import torch

from zoext._benchmarking.timing import threads
from zoext.cli import _asked, _json, _options
from zoext.cli._errors import UserError, reading, require
from zoext.cli._failures import of_model
from zoext.cli._problem.asking import Asked
from zoext.cli._problem.evaluation import Evaluation, evaluate
from zoext.cli._ranks import ALONE
from zoext.cli._settings import Settings
from zoext.tasks import Choices, LabelWords

EXAMPLES = """\
  zoext evaluate runs/reviews
  zoext evaluate runs/reviews --data others.csv --json
  zoext evaluate --model ./my-causal-lm --data reviews.csv --label-words bad=terrible,good=great --calibrate
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; those that are not given are absent from the namespace."""
    _asked.add_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="evaluate again with scores from which those without an input are subtracted, which removes the "
        "preference of a model for some label words",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, and prints the result."""
    require(("transformers", "safetensors"), "finetune")
    options = vars(arguments)
    calibrates, as_json = options.pop("calibrate", False), options.pop("json", False)
    with reading():
        request = _asked.Request.of(options)
        with threads(request.settings.threads):
            device = _options.choose_device(request.settings.device, ALONE)
            asked = request.load(device, answered=True)
            found = {"": _evaluate(asked, request.settings, device)}
            if calibrates:
                found["calibrated"] = _evaluate(_calibrated(asked, device), request.settings, device)
    _print(asked, found, as_json)
    return 0


def _evaluate(asked: Asked, settings: Settings, device: torch.device) -> Evaluation:
    with of_model("evaluation"):
        return evaluate(asked.model, asked.objective, asked.examples, settings.at_once, device)


@torch.no_grad()
def _calibrated(asked: Asked, device: torch.device) -> Asked:
    """With the scores without an input subtracted (Zhao et al., arXiv 2102.09690)."""
    if not (isinstance(asked.task, LabelWords) and isinstance(asked.objective, Choices)):
        raise UserError("--calibrate: only label words are calibrated; give --task label-words, or omit it")
    empty = asked.task.without_input(asked.encoder)
    empty = dataclasses.replace(empty, label=0)
    prior = asked.objective.candidates(asked.model, asked.objective.collate([empty], device))[0]
    objective = Choices(asked.encoder.padding, asked.encoder.kind, asked.task.trains, prior.cpu())
    return dataclasses.replace(asked, objective=objective)


def _print(asked: Asked, found: dict[str, Evaluation], as_json: bool) -> None:
    if as_json:
        record: dict[str, float | int] = {"examples": len(asked.examples)}
        for name, result in found.items():
            record |= {f"{name}{key}".lstrip("_"): value for key, value in result.record("").items()}
        print(_json.text_of(record))
        return
    print(f"{asked.title}: {len(asked.examples)} examples")
    for name, result in found.items():
        perplexity = f", perplexity {math.exp(result.loss.value):.4g}" if asked.objective.is_per_token else ""
        print(f"{name}{': ' if name else ''}{result}{perplexity}")
