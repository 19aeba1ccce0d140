"""What a run has come to: how much the held-out loss changed, and the lr to try next if it hardly did."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from zoext._runtime import atomic
from zoext.cli._errors import writing
from zoext.cli._problem.evaluation import Estimated, Evaluation, ratio
from zoext.cli._runs.records import Record
from zoext.cli._settings import Settings

DIVERGED = 2.0  # times the first held-out loss
_FACTOR = 3.0  # to the next lr


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats, infinite where it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def write_first(path: Path, result: Evaluation) -> None:
    """Keeps the losses of the first evaluation, which later ones are compared with."""
    with writing(path):
        atomic.write_text(path, json.dumps(result.sums.tolist()) + "\n")


def change(path: Path, result: Evaluation) -> Record:
    """The difference of ``result`` to the first evaluation, kept in ``path``, and its standard error.

    The same examples are evaluated each time, so the error is that of the paired difference, which is much
    smaller than those of the two losses. Empty if the first evaluation is not there, or is of other examples.
    """
    first = _read_first(path)
    if first is None or first.shape != result.sums.shape:
        return {}
    losses, predictions = result.sums.cpu()
    found = ratio(losses - first[0], predictions)
    return {"change": found.value, "change_error": found.error}


def _read_first(path: Path) -> Tensor | None:
    try:
        return torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float64)
    except (OSError, ValueError, TypeError, RecursionError):  # an earlier version began the run, or corrupted
        return None


def change_of(first: Record, last: Record) -> Estimated:
    """The difference of the two evaluations; without pairs, its error is that of independent ones."""
    if "change" in last:
        return Estimated(last["change"], last["change_error"])
    error = math.hypot(first["valid_loss_error"], last["valid_loss_error"])
    return Estimated(last["valid_loss"] - first["valid_loss"], error)


def advice(first: Record, last: Record, settings: Settings) -> str | None:
    """What to try next if the run diverged or hardly moved; None if it improved.

    A run has diverged if its held-out loss is not finite or more than ``DIVERGED`` times the first one. It
    has hardly moved if the loss fell by less than the standard error of the paired difference.
    """
    lower, higher = (f"try --lr {next_lr(settings.lr, down=down)}" for down in (True, False))
    loss, before = last["valid_loss"], first["valid_loss"]
    if not math.isfinite(loss) or loss > DIVERGED * before:
        return f"the run diverged: held-out loss {before:.4f} -> {loss:.4f}; {lower}"
    found = change_of(first, last)
    if not math.isfinite(found.error) or found.value < -found.error:
        return None
    if found.value > found.error:
        return f"the held-out loss rose by {found}; {lower}" + (
            ", or --keep best" if settings.keep == "last" else ""
        )
    return f"the run hardly moved: the held-out loss changed by {found}; {higher}, or more --steps"


def next_lr(lr: float, *, down: bool) -> str:
    """The lr to try after ``lr``, as it is written on the command line."""
    return f"{lr / _FACTOR if down else lr * _FACTOR:.2g}"


def of_divergence(error: FloatingPointError, step: int, settings: Settings) -> str:
    """The message for a loss that is not finite at ``step``, with remedies that the command has."""
    cause = str(error).partition(". ")[0]  # what follows is a remedy in Python
    if step == 1:  # nothing has moved
        return f"step {step}: {cause}; try --dtype float32, or a smaller --mu than {settings.mu:g}"
    lower = next_lr(settings.lr, down=True)
    return f"step {step}: {cause}; try --lr {lower} (it was {settings.lr:g}), with --overwrite"
