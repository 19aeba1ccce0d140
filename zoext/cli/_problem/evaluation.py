"""Held-out loss and accuracy, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zoext.cli._problem.objectives import Example, Objective
from zoext.cli._ranks import ALONE, Ranks


@dataclass(frozen=True)
class Estimated:
    """A mean and its standard error over examples."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate``; accuracy is None where the objective does not report it.

    Attributes:
        sums: per example, the sum of its losses and the number of predictions, float64 [2, N], in an order
            that depends on the examples only.
    """

    loss: Estimated
    accuracy: Estimated | None
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, 0), compare=False, repr=False)

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy}"
        return f"loss {self.loss}{accuracy}"

    def record(self, part: str = "valid") -> dict[str, float]:
        """The flat form for a JSON line: "valid_loss", "valid_loss_error" and so on."""
        record = {f"{part}_loss": self.loss.value, f"{part}_loss_error": self.loss.error}
        if self.accuracy is not None:
            record |= {
                f"{part}_accuracy": self.accuracy.value,
                f"{part}_accuracy_error": self.accuracy.error,
            }
        return record

    @classmethod
    def of_record(cls, record: dict[str, float]) -> Evaluation:
        """The inverse of ``record``."""
        loss = Estimated(record["valid_loss"], record["valid_loss_error"])
        if "valid_accuracy" not in record:
            return cls(loss, None)
        return cls(loss, Estimated(record["valid_accuracy"], record["valid_accuracy_error"]))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    batch_size: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Evaluates the model on ``examples``, batched by length to reduce padding.

    Batches are dealt out over ranks, which gives the bits of one process.
    """
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    found = torch.zeros(3, len(by_length), dtype=torch.float64, device=device)
    for start in ranks.share_of(range(0, len(by_length), batch_size)):
        some = slice(start, start + batch_size)
        scores = objective.scores(model, objective.collate(by_length[some], device))
        found[:, some] = torch.stack(
            [each.double() for each in (scores.loss, scores.predictions, scores.correct)]
        )
    loss, predictions, correct = ranks.sum(found)
    return Evaluation(
        ratio(loss, predictions),
        ratio(correct, predictions) if objective.reports_accuracy else None,
        torch.stack([loss, predictions]),
    )


def ratio(sums: Tensor, counts: Tensor) -> Estimated:
    """The mean over all predictions and its standard error over examples.

    Predictions of one example are dependent, so the examples are the sample: the linearised variance of a
    ratio estimator (Cochran, Sampling Techniques, section 6.3), with n - 1 in place of n. If every count is
    1, it equals the standard error of the mean.
    """
    sums, counts = sums.double(), counts.double()
    mean = (sums.sum() / counts.sum()).item()
    n = len(sums)
    if n < 2:
        return Estimated(mean, math.nan)
    residual = ((sums - mean * counts).square().sum() * n / (n - 1)).sqrt()
    return Estimated(mean, (residual / counts.sum()).item())
